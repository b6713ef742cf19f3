"""On which device ranks exchange, for groups that this machine need not have."""

from types import SimpleNamespace

import pytest
import torch

from gradkeel.ranks.group import _device_for


@pytest.mark.parametrize(
    ("kinds", "given", "wanted"),
    [
        (["cpu"], "cpu", "cpu"),
        (["cuda"], "cpu", "cuda:3"),  # NCCL alone, parameters offloaded to the CPU
        (["cuda"], "cuda:3", "cuda:3"),
        (["cpu", "cuda"], "cpu", "cpu"),
        (["cpu", "cuda"], "cuda:3", "cuda:3"),
        (["cpu"], "cuda:3", "cpu"),
        ([], "cpu", "cpu"),
    ],
)
def test_a_group_exchanges_on_a_device_that_it_knows(monkeypatch, kinds, given, wanted):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    group = SimpleNamespace(_device_types=[torch.device(kind) for kind in kinds])
    assert _device_for(group, torch.device(given)) == torch.device(wanted)
