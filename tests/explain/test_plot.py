"""A run's pictures in a notebook."""

import itertools

import pytest

import gradkeel as gk
from gradkeel.errors import RecordError
from gradkeel.record import Reader
from scripted import scripted_run

pytest.importorskip("plotly", reason="needs the extra report")


@pytest.mark.parametrize("losses", [None, [3.0, 2.0, 1.0]])
def test_norms_loss_and_parameters_over_the_same_steps(tmp_path, losses):
    scripted_run(
        tmp_path / "run.keel", [[3.0, 4.0], [6.0, 8.0], [0.3, 0.4]], losses=losses, policy="global-norm:5.0"
    )
    figure = gk.plot(tmp_path / "run.keel")
    shown = {trace.name: list(trace.y) for trace in figure.data if trace.name}
    assert shown["before clipping"] == pytest.approx([5, 10, 0.5])
    assert shown["after clipping"] == pytest.approx([5, 5, 0.5])
    assert shown.get("loss") == losses
    assert figure.data[-1].type == "heatmap"
    assert list(figure.data[-1].y) == ["a", "b"]
    assert list(figure.data[-1].customdata[1]) == pytest.approx([4, 8, 0.4])
    axes = []
    figure.for_each_yaxis(lambda axis: axes.append(axis.domain))
    assert len(axes) == (2 if losses is None else 3)
    assert all(below[1] < above[0] for above, below in itertools.pairwise(axes))  # none is drawn over another
    with Reader(tmp_path / "run.keel") as run:
        assert gk.plot(run) == figure


def test_a_record_that_is_not_there(tmp_path):
    with pytest.raises(RecordError, match="there is no record"):
        gk.plot(tmp_path / "run.keel")


def test_it_is_shown_without_plotlys_own_buttons(tmp_path, monkeypatch):
    import plotly.io

    shown = []
    monkeypatch.setattr(plotly.io, "show", lambda figure, **settings: shown.append(settings["config"]))
    scripted_run(tmp_path / "run.keel", [[3.0, 4.0]])
    figure = gk.plot(tmp_path / "run.keel")
    figure.show()
    figure.show(config={})
    figure._ipython_display_()
    assert [config.get("displaylogo") for config in shown] == [False, None, False]
