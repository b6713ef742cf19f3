"""Finds and loads the native library, and what it needs of torch: its C exporter of tensors, and its OpenMP threads."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIABLE = "GRADKEEL_NATIVE"
"""Environment variable: ``off`` leaves the kernels alone; ``baseline``, ``avx2`` or ``avx512`` names a level."""

# What gradkeel_interface() of a library that fits must return.
_INTERFACE = 12
LIBRARY = Path(__file__).with_name("_native.so")

# What the user can do.
_AGAIN = "install gradkeel again, with pip's --force-reinstall --no-deps"
_OTHER_TORCH = "install torch 2.13, for which they are made"


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1.x."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("managed_from_object", ctypes.c_void_p),
        ("managed_to_object", ctypes.c_void_p),
        ("tensor_from_object", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    )


class _Method(ctypes.Structure):
    """PyMethodDef of Python's stable ABI."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_METHODS: list[_Method] = []
"""Python's functions look into these for ever."""
# In the order of struct python in native.c.
_PYTHON = (
    "PyList_GetItem", "PyList_Size", "PyLong_AsLongLong", "PyFloat_AsDouble", "PyByteArray_FromStringAndSize",
    "PyByteArray_AsString", "PyObject_IsInstance", "PyLong_FromLongLong", "PyFloat_FromDouble", "PyList_New",
    "PyList_SetItem", "PyErr_Occurred", "PyErr_NoMemory", "Py_IncRef", "Py_DecRef",
)  # fmt: skip


class UnavailableError(Exception):
    """Why the native kernels are not in use.

    Attributes:
        remedy: what one can do about it, if anything.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.remedy = remedy


def load() -> ctypes.CDLL:
    """The library; raises `UnavailableError` where there is none that fits."""
    if not LIBRARY.exists():
        if sys.platform != "linux":
            raise UnavailableError("not built: they are for Linux")
        raise UnavailableError(
            f"not built: gradkeel was installed without a working C compiler, or with {VARIABLE}=off",
            f"install a C compiler such as gcc, then {_AGAIN}",
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        interface = library.gradkeel_interface()
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"cannot be loaded: {error}", _AGAIN) from None
    if interface != _INTERFACE:
        raise UnavailableError("built from other sources than these", _AGAIN)
    return library


def exporter() -> Any:
    """Address of the function by which torch describes a tensor in C."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise UnavailableError(f"torch {torch.__version__} has no C interface for DLPack", _OTHER_TORCH)
    pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    exchange = _Exchange.from_address(
        pointer_in(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    )
    if exchange.major != 1 or not exchange.tensor_from_object:
        raise UnavailableError(
            f"torch {torch.__version__} has DLPack {exchange.major}.{exchange.minor}, not 1.x", _OTHER_TORCH
        )
    return exchange.tensor_from_object


def builtin(library: Any, name: str) -> Any:
    """A function of the library that takes Python's own objects, as one of Python's own: METH_FASTCALL."""
    method = _Method(
        name.encode(), ctypes.cast(getattr(library, f"gradkeel_{name}"), ctypes.c_void_p), 0x80, None
    )
    _METHODS.append(method)
    make = ctypes.PYFUNCTYPE(ctypes.py_object, *(ctypes.c_void_p,) * 3)(
        ("PyCFunction_NewEx", ctypes.pythonapi)
    )
    return make(ctypes.addressof(method), None, None)


def python() -> ctypes.Array[ctypes.c_void_p]:
    """What native.c needs of Python and torch: its struct python."""
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in _PYTHON]
    return (ctypes.c_void_p * (len(functions) + 2))(*functions, id(bytearray), exporter())


def openmp() -> Any:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded; None where it is of another kind.

    Looked up through torch's library, so that a second OpenMP library never comes into the process.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p)
    return None
