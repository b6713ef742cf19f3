"""Every test of measuring runs by the native kernels, where they are built, and by torch's operations."""

import pytest

from gradkeel.kernels import native


@pytest.fixture(params=["native", "torch"], autouse=True)
def path(request, monkeypatch):
    """Which of the two does the work."""
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip(native.unavailable())
    return request.param
