"""Host syncs on CUDA, which tests forbid."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def without_sync():
    """Inside, whatever makes the host wait raises; the mode ends with the block, also where that raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # Setting the mode warns that it is a prototype.
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
