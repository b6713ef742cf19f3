"""A CUDA device that is none: `simulated_cuda.cpp` is its memory and its operations, this module its Python side.

A plugin of pytest (``-p simulated_cuda``, see ``make test-simulated``), to be imported before torch. Its memory is the
host's, and torch's CPU kernels do its work, but tensors say ``cuda``, so that torch and gradkeel go the ways that they
go there; and what a device may not have done yet nobody sees. A copy to the host is garbage until an event says that it
is there, pinned memory must not be written to while it is on its way, what waits raises where
``torch.cuda.set_sync_debug_mode("error")`` forbids it, and what is captured is noted and run by the replay alone.

Not simulated: several devices, streams that overtake each other, memory of a graph's pool that is used twice, sparse
tensors, ``torch.compile``, and collectives.
"""

import contextlib
import ctypes
import itertools
import os

_library = ctypes.CDLL(os.environ["SIMULATED_CUDA"])

import torch  # noqa: E402  # only now
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

assert _library.simulated_cuda_works(), "torch was imported before"

_capturing = []
"""The graph that is being captured, if one is."""

_handles = itertools.count(1)
_users = {}
"""How many graphs there are in each pool that was ever captured into."""


class Capture(TorchDispatchMode):
    """Notes what is launched, and hands out memory that the replays will write."""

    def __init__(self):
        super().__init__()
        self.launches, self.results = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        is_made_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not is_made_there and not any(tensor.is_cuda for tensor in tensors):
            return function(*args, **kwargs)
        name = function._schema.name.partition("::")[2]
        if name == "copy_" and any(not tensor.is_cuda and not tensor.is_pinned() for tensor in args[:2]):
            raise RuntimeError("operation not permitted when stream is capturing (simulated): copy_")
        aliases = [argument.alias_info for argument in function._schema.arguments]
        if any(alias is not None and alias.is_write for alias in aliases):
            self.launches.append(lambda: function(*args, **kwargs))
            return kwargs.get("out", args[0]) if function._schema.returns else None
        results = function(*args, **kwargs)
        is_view = any(alias is not None for alias in aliases)
        if not is_view and "empty" not in name:
            found = [one for one in tree_leaves(results) if isinstance(one, torch.Tensor)]
            self.results += found
            self.launches.append(lambda: _copy(tree_leaves(function(*args, **kwargs)), found))
        return results

    def end(self):
        """Spoil what was handed out: nothing has been computed."""
        for result in self.results:
            result.fill_(float("nan") if result.is_floating_point() else 1)


def _copy(sources, targets):
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


class CUDAGraph:
    """In place of torch's."""

    def __init__(self, keep_graph=False):
        self._capture, self._pool = Capture(), None

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert torch.cuda.current_stream().cuda_stream != 0, "the default stream cannot be captured"
        assert not _capturing, "one capture at a time"
        pool = _handle() if pool is None else pool
        if _users.get(pool) == 0:  # its last graph has gone, and the pool with it
            raise RuntimeError(
                "use_count > 0 INTERNAL ASSERT FAILED (simulated): a pool is used that is gone"
            )
        _users[pool] = _users.get(pool, 0) + 1
        self._pool = pool
        _capturing.append(self._capture)
        self._may_wait = not _library.simulated_cuda_forbids_waiting(True)
        self._capture.__enter__()

    def capture_end(self):
        self._capture.__exit__(None, None, None)
        _capturing.remove(self._capture)
        _library.simulated_cuda_forbids_waiting(not self._may_wait)
        self._capture.end()

    def replay(self):
        if _capturing:
            raise RuntimeError("operation not permitted when stream is capturing (simulated): replay")
        for launch in self._capture.launches:
            launch()

    def __del__(self):
        if self._pool is not None:
            _users[self._pool] -= 1


def _handle():
    return 0, next(_handles)


class Stream:
    """In place of torch's."""

    def __init__(self, device=None, priority=0, own=None):
        self.own = torch.Stream(device="cuda") if own is None else own

    @property
    def cuda_stream(self):
        return self.own.stream_id

    def wait_stream(self, other):
        """All streams are one here."""

    def synchronize(self):
        torch.accelerator.synchronize()


class StreamContext(contextlib.AbstractContextManager):
    """In place of ``torch.cuda.stream``."""

    def __init__(self, stream):
        self._stream, self._before = stream, []

    def __enter__(self):
        self._before.append(torch.accelerator.current_stream("cuda"))
        torch.accelerator.set_stream(self._stream.own)

    def __exit__(self, *error):
        torch.accelerator.set_stream(self._before.pop())


class GraphContext(contextlib.AbstractContextManager):
    """In place of ``torch.cuda.graph``."""

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self._graph, self._stream = graph, StreamContext(stream or Stream())

    def __enter__(self):
        self._stream.__enter__()
        self._graph.capture_begin()

    def __exit__(self, *error):
        self._graph.capture_end()
        self._stream.__exit__(*error)


def _tensor_of(storage):
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_on_host(value):
    """A tensor of the host's with the same memory; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    size = value.untyped_storage().nbytes() - value.storage_offset() * value.itemsize
    if not size:
        return torch.empty(0, dtype=value.dtype, device="cpu")
    return torch.frombuffer((ctypes.c_char * size).from_address(value.data_ptr()), dtype=value.dtype)


def _install():
    cuda = torch.cuda
    cuda.init = cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda device=None: "simulated"
    cuda.device = contextlib.nullcontext
    cuda.empty_cache = lambda: None
    cuda.synchronize = lambda device=None: torch.accelerator.synchronize()
    cuda.set_sync_debug_mode = lambda mode: _library.simulated_cuda_forbids_waiting(mode == "error")
    cuda.Stream, cuda.stream = Stream, StreamContext
    cuda.current_stream = lambda device=None: Stream(own=torch.accelerator.current_stream("cuda"))
    cuda.CUDAGraph, cuda.graph = CUDAGraph, GraphContext
    cuda.graph_pool_handle = _handle
    cuda.is_current_stream_capturing = lambda: bool(_capturing)
    # Numbers are drawn by the host.
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed_all = lambda seed: None
    storage = torch.UntypedStorage
    storage.clone = lambda self: _tensor_of(self).clone().untyped_storage()
    storage.cpu = lambda self: _tensor_of(self).cpu().untyped_storage()
    storage.to = lambda self, *, device, non_blocking=False: _tensor_of(self).to(device).untyped_storage()


def _install_in_triton():
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    run, convert = interpreter.InterpretedFunction.run, interpreter._convert_float
    dtypes = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def launch(self, *args, **kwargs):
        if _capturing:
            _capturing[-1].launches.append(lambda: launch(self, *args, **kwargs))
        else:
            run(self, *map(_memory_on_host, args), **kwargs)

    def rounded(data, source, target, rounding_mode):
        """To the nearest, as a GPU does; the interpreter cuts off."""
        if not {str(source), str(target)} <= dtypes.keys():
            return convert(data, source, target, rounding_mode)
        given = torch.frombuffer(bytearray(data.tobytes()), dtype=dtypes[str(source)])
        words = f"uint{target.primitive_bitwidth}"
        return given.to(dtypes[str(target)]).view(torch.uint8).numpy().view(words).reshape(data.shape)

    interpreter.InterpretedFunction.run = launch
    interpreter._convert_float = rounded


_install()
_install_in_triton()
