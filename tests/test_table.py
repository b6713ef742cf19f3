"""`gk.gradients(model)`: the gradients as they are, without attaching anything."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(1, 1), nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


@pytest.fixture
def net():
    return Net()


def blow_up(net):
    (net.linear(torch.tensor([[10.0]])) - 4.0).square().sum().backward()


def test_the_blow_up_of_the_tutorial(net):
    blow_up(net)
    table = gk.gradients(net)
    assert table["linear.weight"].gradient_norm == 120.0
    assert table["linear.bias"].gradient_norm == 12.0
    assert table["linear.weight"].weight_norm == 1.0
    assert table["unused.weight"].gradient_norm is None
    assert table["unused.weight"].shape == (3, 2)
    assert [row.name for row in table] == [name for name, _ in net.named_parameters()]
    assert len(table) == 5


def test_quantized_weights_have_no_norm(net):
    net.codes = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    blow_up(net)
    assert math.isnan(gk.gradients(net)["codes"].weight_norm)
    assert gk.gradients(net)["linear.weight"].gradient_norm == 120.0


def test_it_prints_well_before_and_after_backward(net):
    before = repr(gk.gradients(net))
    blow_up(net)
    after = repr(gk.gradients(net))
    for text in (before, after):
        lines = text.splitlines()
        assert len({len(line) for line in lines}) == 1
        assert lines[0].split() == ["parameter", "shape", "weight", "norm", "gradient", "norm"]
    assert before.count("None") == 5
    assert after.count("None") == 3
    assert "scale" in before
    assert "scalar" in before


def test_it_changes_nothing(net):
    blow_up(net)
    versions = [p.grad._version for p in net.linear.parameters()]
    gk.gradients(net)
    assert [p.grad._version for p in net.linear.parameters()] == versions


def test_an_unknown_name_lists_the_known(net):
    with pytest.raises(KeyError, match=r"no parameter 'bias'; there are scale, linear\.weight"):
        gk.gradients(net)["bias"]


def test_tied_sparse_complex_and_low_precision():
    model = nn.ModuleDict({"a": nn.Embedding(3, 2, sparse=True), "b": nn.Linear(2, 3, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"](torch.tensor([0, 0])).sum().backward()
    model.register_parameter("c", nn.Parameter(torch.tensor([3.0 + 4.0j])))
    model.register_parameter("d", nn.Parameter(torch.full((1000,), 3000.0, dtype=torch.float16)))
    table = gk.gradients(model)
    assert [row.name for row in table] == ["c", "d", "a.weight"]
    assert table["a.weight"].gradient_norm == pytest.approx(8**0.5)
    assert table["c"].weight_norm == 5.0
    assert table["d"].weight_norm == pytest.approx(3000 * 1000**0.5)


def test_as_html_for_notebooks(net):
    blow_up(net)
    html = gk.gradients(net)._repr_html_()
    assert "<td>linear.weight</td><td>1x1</td><td>1</td><td>120</td>" in html


def test_a_model_without_parameters():
    assert len(gk.gradients(nn.Identity())) == 0
    assert repr(gk.gradients(nn.Identity())).startswith("parameter")
