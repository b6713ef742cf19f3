"""The arithmetic that bounds and forms are written in: on tensors [k] of all cells, or on the plain numbers of one.

On CPU an operation on a small tensor takes a microsecond or more, on a plain number a twentieth of that. So a formula
stands once, in operators and in the functions of this module, and is followed on tensors, or once on symbols, from
which ``written`` makes one function of plain numbers. Plain numbers give what tensors give, also where Python would
raise: ``log(0)`` is -inf, ``exp(1000)`` is inf, ``divide(1, 0)`` is inf.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradkeel.policies.symbols import Symbol

Number: TypeAlias = Any
"""A tensor [k] with one number for each cell, or the plain number of one cell."""

Memory: TypeAlias = Mapping[str, Any]
"""What is kept from step to step: tensors with the leading dimension k, or what one cell keeps of them."""

# Plain numbers are asked for first: `isinstance(..., Tensor)` takes as long as what is then done with them.
# torch 2.6's clamp takes a plain NaN for no limit; its clamp_min and clamp_max give NaN, as later ones do.


def where(condition: Number, yes: Number, no: Number) -> Number:
    """``yes`` where the condition holds, else ``no``; both are computed by then."""
    if condition is True:
        return yes
    if condition is False:
        return no
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    if isinstance(condition, Symbol):
        return condition.write("where", condition, yes, no)
    return yes if condition else no  # such as NumPy's bool


def maximum(first: Number, second: Number) -> Number:
    """The larger; NaN if either is. A tensor among them comes first."""
    if type(first) is not float:
        if isinstance(first, Tensor):
            return first.clamp_min(second)
        if isinstance(first, Symbol):
            return first.write("maximum", first, second)
    return first if first >= second or first != first else second


def minimum(first: Number, second: Number) -> Number:
    """The smaller; NaN if either is. A tensor among them comes first."""
    if type(first) is not float:
        if isinstance(first, Tensor):
            return first.clamp_max(second)
        if isinstance(first, Symbol):
            return first.write("minimum", first, second)
    return first if first <= second or first != first else second


def divide(first: Number, second: Number) -> Number:
    """``first / second``, also by zero."""
    if type(second) is not float and isinstance(second, Symbol):
        return second.call(divide, first, second, operation="divide")
    if (type(second) is not float and isinstance(second, Tensor)) or second:
        return first / second
    return first * math.copysign(math.inf, second)


def log(value: Number) -> Number:
    """The natural logarithm."""
    if type(value) is not float:
        if isinstance(value, Tensor):
            return value.log()
        if isinstance(value, Symbol):
            return value.call(log, value, operation="log")
    if value > 0:
        return math.log(value)
    return -math.inf if value == 0 else math.nan


def exp(value: Number) -> Number:
    """The exponential."""
    if type(value) is not float:
        if isinstance(value, Tensor):
            return value.exp()
        if isinstance(value, Symbol):
            return value.call(exp, value, operation="exp")
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def expm1(value: Number) -> Number:
    """``exp(value) - 1`` for a value of at most 0."""
    if type(value) is not float:
        if isinstance(value, Tensor):
            return value.expm1()
        if isinstance(value, Symbol):
            return value.call(math.expm1, value, operation="expm1")
    return math.expm1(value)


def sqrt(value: Number) -> Number:
    """The square root."""
    if type(value) is not float:
        if isinstance(value, Tensor):
            return value.sqrt()
        if isinstance(value, Symbol):
            return value.call(sqrt, value, operation="sqrt")
    return math.sqrt(value) if value >= 0 else math.nan


def real(count: Number, like: Number) -> Number:
    """A whole number as a real one, of the kind of ``like``."""
    if type(count) is not int:
        if isinstance(count, Tensor):
            return count.to(like.dtype)
        if isinstance(count, Symbol):
            return count.call(float, count, operation="real")
    return float(count)


def constant(value: Number, like: Number) -> Number:
    """[1] ``value`` beside tensors, or the plain number beside one."""
    if isinstance(like, Tensor):
        return like.new_full((1,), value)
    return value.call(float, value, operation="real") if isinstance(value, Symbol) else float(value)


def ask(function: Callable[[Any], Any], value: Number) -> Any:
    """What a function that is not written in these operations says of a plain number, such as that of the step."""
    return value.call(function, value) if isinstance(value, Symbol) else function(value)
