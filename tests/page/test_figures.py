"""Figures: what is drawn, not how it looks."""

import math
import sys

import pytest

pytest.importorskip("plotly", reason="figures need the extra report")

from gradkeel.errors import MissingExtraError
from gradkeel.page.figures import COLORS, Band, Curves, Point, Series, against, curves, median_line

INF, NAN = math.inf, math.nan


def named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


def test_a_thin_line_a_seed_and_a_thick_median():
    figure = curves([Curves("p", [[1, 2, 3], [3, 4, 5], [2, 9, 4]], 1)], x_title="x", y_title="y")
    thin = [trace for trace in figure.data if trace.line.width == 1]
    (median,) = named(figure, "p")
    assert [list(trace.y) for trace in thin] == [[1, 2, 3], [3, 4, 5], [2, 9, 4]]
    assert list(median.y) == [2, 4, 4]
    assert {trace.line.color for trace in figure.data} == {COLORS[1]}
    assert not any(trace.showlegend for trace in thin)
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.type) == ("x", "log")


def test_a_line_that_stops_being_finite_ends_in_a_cross():
    figure = curves([Curves("p", [[1, 2, INF], [1, 2, 3]], 0)], x_title="x", y_title="y")
    (cross,) = [trace for trace in figure.data if trace.mode == "markers"]
    assert (list(cross.x), list(cross.y), cross.marker.symbol) == ([1], [2], "x")
    assert list(figure.data[0].y) == [1, 2, None]


def test_the_median_counts_a_line_that_has_ended_as_infinitely_high():
    assert median_line([[1, 1], [2, 2, 9], [3, 3, 7]]) == [2, 2, 9]
    assert median_line([[1, NAN], [2, 2], [3, 3]]) == [2, 3]
    assert median_line([]) == []


def test_points_that_failed_are_crosses_above_all_others():
    points = [Point(1, 2.0, 1.0, 5.0, "a note"), Point(2, INF, NAN, NAN), Point(4, 3.0, 3.0, INF)]
    figure = against([Series("p", points, 0)], x_title="x", y_title="y", failed="diverged")
    line, cross = figure.data
    assert (list(line.x), list(line.y)) == ([1, 4], [2, 3])
    assert (list(line.error_y.array), list(line.error_y.arrayminus)) == ([3, 0], [1, 0])
    assert list(cross.x) == [2]
    assert cross.y[0] > 5
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "4"]
    assert "diverged" in [note.text for note in figure.layout.annotations]


def test_a_series_that_failed_everywhere_is_still_in_the_legend():
    figure = against([Series("p", [Point(1, INF, NAN, NAN)], 0)], x_title="x", y_title="y", failed="diverged")
    assert [trace.name for trace in figure.data if trace.showlegend] == ["p"]


def test_bands_are_shaded_and_named():
    series = [Series("p", [Point(1, 2, 2, 2), Point(10, 3, 3, 3)], 0)]
    figure = against(series, x_title="x", y_title="y", failed="", bands=[Band(0.1, 10, "works", "good")])
    (shape,) = figure.layout.shapes
    assert (shape.x0, shape.x1) == (0.1, 10)
    (label,) = figure.layout.annotations
    # Annotations on a logarithmic axis are placed by their logarithm: half way between 0.1 and 10.
    assert (label.text, label.x) == ("works", 0)


def test_names_are_escaped():
    evil = '<img src=x onerror="alert(1)">'
    figure = curves([Curves(evil, [[1, 2], [1, INF]], 0)], x_title="x", y_title="y")
    points = against([Series(evil, [Point(1, 2, 2, 2, evil)], 0)], x_title="x", y_title="y", failed="no")
    for drawn in (figure, points):
        assert "<img" not in drawn.to_json()
        assert "&lt;img" in drawn.data[-1].name


def test_without_plotly_the_error_holds_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gradkeel\[report\]'"):
        curves([], x_title="x", y_title="y")
