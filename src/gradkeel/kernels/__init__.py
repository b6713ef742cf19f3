"""Compiled code: native kernels for CPU tensors, Triton kernels for accelerators; each says whether it did the work."""

from gradkeel.kernels import formulas as formulas  # it offers itself to policies
