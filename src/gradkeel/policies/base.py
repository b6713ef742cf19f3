"""This module says what a policy is, and has the checks and spellings that all of them share."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, Literal, NoReturn

from torch import Tensor

from gradkeel.norms import Decision, GradientNorms, Needs, State

Scope = Literal["value", "unit", "tensor", "group", "global"]

SCOPE_WORDS: Mapping[str, str] = {
    "value": "each entry separately",
    "unit": "each output unit separately",
    "tensor": "each tensor separately",
    "group": "each parameter group together",
    "global": "all tensors together",
}


class Policy(ABC):
    """Decides from norms what is done to gradients: ``decide(norms, state) -> (Decision, new_state)``.

    A policy is configuration: frozen, hashable, comparable, and written as a spec string by ``policy.spec``. What it
    remembers is in the state that it returns. It never sees gradients or the optimizer, so the same object serves a
    live run, every rank of a distributed one, and the replay of a record.
    """

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What must be measured for this policy."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The string from which ``gradkeel.policies.spec.parse`` makes this policy again."""

    @abstractmethod
    def init(self, norms: GradientNorms) -> State:
        """Return the state before the first step, shaped after ``norms`` (whose values are not looked at)."""

    @abstractmethod
    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        """Decide on one step; does not sync the host."""


def decide(
    policy: Policy, norms: GradientNorms, state: State, *, may_clamp: bool = True
) -> tuple[Decision, State]:
    """Return a policy's decision on one step, and its new state; does not sync the host.

    Raises:
        ValueError: for a decision that does not fit the norms, as a policy of one's own may give.
        TypeError: for anything but a decision and a state.
    """
    given: Any = policy.decide(norms, state)
    fits = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Decision)
    if not fits or given[1] is None:
        raise TypeError(
            f"{policy!r}: decide() returned {_kind(given)}; it must be (Decision(...), state), where a policy that "
            "remembers nothing returns the state that it was given"
        )
    decision: Decision = given[0]
    after: State = given[1]
    coefficients, units, skip = decision.known_coefficients, decision.unit_coefficients, decision.known_skip
    clamp = decision.clamp
    if type(coefficients) is not float and coefficients is not None:
        n = len(norms.names)
        if _shape(coefficients) not in ((), (n,)):
            rule = f"a float, a list of length {n} or a tensor of shape [] or [{n}]: one for all, or one for each"
            _misfit(policy, "coefficients", coefficients, rule)
    if units is not None and (norms.units is None or _shape(units) != norms.units.shape):
        rule = "None, for its needs have no unit_dim"
        if norms.units is not None:
            rule = f"a tensor of shape [{len(norms.units)}]: one for each unit"
        _misfit(policy, "unit_coefficients", units, rule)
    if type(skip) is not bool and skip is not None and _shape(skip) != ():
        _misfit(policy, "skip", skip, "a bool or a tensor of shape []: whether the whole step is skipped")
    if clamp is not None:
        given = tuple(clamp) if isinstance(clamp, list) else clamp
        if not _are_limits(clamp):
            _misfit(policy, "clamp", given, "(lowest, highest): two numbers, lowest not above highest")
        if not may_clamp:
            _misfit(policy, "clamp", given, "None, for entries are clamped last, and of all groups alike")
    held = norms.known_norms
    if isinstance(held, bytearray) or held.is_cpu:
        return decision, after
    return decision.beside(held), after


def is_own(value: object) -> bool:
    """Whether a policy is made of gradkeel's own parts, which decide by tensors alone, each time by new ones."""
    if value is None or isinstance(value, int | float | str):
        return True
    if isinstance(value, tuple | list):
        return all(map(is_own, value))
    if isinstance(value, Mapping):
        return all(map(is_own, value.values()))
    parts = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return type(value).__module__.startswith("gradkeel.") and all(
        is_own(getattr(value, part.name)) for part in parts
    )


def _are_limits(clamp: object) -> bool:
    if not isinstance(clamp, tuple | list) or len(clamp) != 2:
        return False
    low, high = clamp
    if any(isinstance(limit, bool) or not isinstance(limit, Real) for limit in (low, high)):
        return False
    return bool(low <= high and low < math.inf and high > -math.inf)  # of NaN none is true


def _shape(value: object) -> tuple[int, ...] | None:
    """The shape of what a decision may hold; None of anything else."""
    if isinstance(value, Tensor):
        return value.shape
    return (len(value),) if isinstance(value, list) else None


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_kind, value))})"
    return "None" if value is None else type(value).__name__


def _misfit(policy: Policy, field: str, value: object, rule: str) -> NoReturn:
    shape = _shape(value)
    given = f"{value!r}" if shape is None else f"{type(value).__name__} of shape {list(shape)}"
    raise ValueError(f"{policy!r}: decide() returned Decision({field}=...) of {given}; it must be {rule}")


def spec_value(value: object) -> str:
    """Write a parameter as in a spec string."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    # 1e+16 would read as the chain of 1e and 16.
    return str(value).replace("e+", "e")


def positive(owner: str, argument: str, value: object, *, infinite: bool = False) -> float:
    """Return ``value`` as a float if it is a positive number; else raise, naming the argument, the rule and the fix."""
    off = "; to turn clipping off pass None as the policy" if argument in {"max_norm", "max"} else ""
    number = _number(owner, argument, value, f"must be a positive number{off}")
    if not number > 0 or (math.isinf(number) and not infinite):
        _refuse(owner, argument, value, f"must be a positive number{off}")
    return number


def between(owner: str, argument: str, value: object, low: float, high: float) -> float:
    """Return ``value`` as a float if it lies between ``low`` and ``high``, both excluded; else raise."""
    rule = f"must be a number between {low:g} and {high:g}"
    number = _number(owner, argument, value, rule)
    if not low < number < high:
        _refuse(owner, argument, value, rule)
    return number


def count(owner: str, argument: str, value: object, *, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``least``; else raise."""
    rule = f"must be a whole number of at least {least}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}({argument}={value!r}): {argument} {rule}, not {type(value).__name__}")
    if value < least:
        _refuse(owner, argument, value, rule)
    return value


def check_fields(owner: Any) -> None:
    """Refuse a dataclass unless the fields that its class names in ``_positive`` and ``_shares`` are such numbers."""
    for name in owner._positive:
        positive(type(owner).__name__, name, getattr(owner, name))
    for name in owner._shares:
        between(type(owner).__name__, name, getattr(owner, name), 0, 1)


class Part:
    """A bound or a form: a frozen dataclass of plain numbers, with a formula.

    A subclass whose formula is written in the operations of `gradkeel.policies.numbers` says so by
    ``class Mine(Bound, on_numbers=True)``, and which of its fields are numbers above 0, or between 0 and 1, in
    ``_positive`` and ``_shares``.
    """

    on_numbers: ClassVar[bool] = False
    _positive: ClassVar[tuple[str, ...]] = ()
    _shares: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, *, on_numbers: bool = False) -> None:
        """Note what the subclass says of its own formula; it is not inherited, for formulas may be overridden."""
        super().__init_subclass__()
        cls.on_numbers = on_numbers

    def __post_init__(self) -> None:
        # NumPy's numbers compute differently, and warn.
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # whoever is made is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Real) and not isinstance(value, int):
                object.__setattr__(self, field.name, float(value))
        check_fields(self)


def _number(owner: str, argument: str, value: object, rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are Real
        rule, semicolon, fix = rule.partition(";")
        shown = (
            f"{owner}({argument}={value!r}): {argument} {rule}, not {type(value).__name__}{semicolon}{fix}"
        )
        raise TypeError(shown)
    return float(value)


def _refuse(owner: str, argument: str, value: object, rule: str) -> NoReturn:
    raise ValueError(f"{owner}({argument}={value!r}): {argument} {rule}")
