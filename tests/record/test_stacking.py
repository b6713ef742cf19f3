"""What is stacked on a device must be there: some of it the host may know already."""

import torch

from gradkeel.record.rows import _coefficients


def test_coefficients_that_the_host_knows_stand_beside_those_on_the_device():
    norms = torch.empty(4, dtype=torch.float64, device="meta")
    for values in ([None, None], [0.5, None], [torch.empty((), dtype=torch.float64, device="meta"), 1.0]):
        found = _coefficients(values, norms)
        assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 4), torch.float64)
    here = _coefficients([None, 0.5], torch.zeros(3, dtype=torch.float64))
    assert here.tolist() == [[1.0] * 3, [0.5] * 3]
