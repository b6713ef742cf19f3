"""What a named policy is: its parameters, and the parts that it is made of."""

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, ClassVar, get_args

from gradkeel.norms import Decision, GradientNorms, Needs, State
from gradkeel.policies.base import SCOPE_WORDS, Policy, check_fields, spec_value
from gradkeel.policies.clip import Clip


@dataclass(frozen=True, repr=False)
class NamedPolicy(Policy):
    """A published method: a name, its parameters, and the parts that it is made of.

    A subclass is a frozen dataclass with ``spec_name``, `parts`, and a docstring whose first sentence and whose
    sections Formula, Args, Cost and Source are what ``gradkeel policies`` prints.
    """

    spec_name: ClassVar[str]
    _positive: ClassVar[tuple[str, ...]] = ()
    _shares: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def parts(self) -> Policy:
        """The policy that this name stands for."""

    @cached_property
    def _parts(self) -> Policy:
        return self.parts

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            _ = self._parts
        except (TypeError, ValueError) as error:
            # The part names itself; whoever wrote the policy knows its parameters, which have the same names.
            raise type(error)(f"{self._call()}: {str(error).partition('): ')[2] or error}") from None

    @property
    def needs(self) -> Needs:
        return self._parts.needs

    def init(self, norms: GradientNorms) -> State:
        return self._parts.init(norms)

    def decide(self, norms: GradientNorms, state: State) -> tuple[Decision, State]:
        return self._parts.decide(norms, state)

    @property
    def spec(self) -> str:
        """Name and the parameters that are not at their defaults, such as ``global-norm:1.0,norm_type=inf``."""
        words = [
            spec_value(value) if required else f"{name}={spec_value(value)}"
            for name, value, required in self._given()
        ]
        return f"{self.spec_name}:{','.join(words)}" if words else self.spec_name

    def __repr__(self) -> str:
        """Show the call that makes this policy, and what it bounds, as a comment."""
        words = f"  # {SCOPE_WORDS[self._parts.scope]}" if isinstance(self._parts, Clip) else ""
        return f"{self._call()}{words}"

    def _call(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, _ in self._given())})"

    def _given(self) -> list[tuple[str, object, bool]]:
        """Return name and value of the parameters that are required or not at their defaults, and whether required."""
        return [
            (
                field.name,
                _as_declared(getattr(self, field.name), field.type),
                field.default is dataclasses.MISSING,
            )
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or not _is(getattr(self, field.name), field.default)
        ]


def _is(value: object, default: object) -> bool:
    """Whether a parameter is at its default; a tensor, which is none and may not be compared, is not."""
    return value is default or (isinstance(value, Real | str) and value == default)


def _as_declared(value: object, kind: Any) -> object:
    """Write a number as where a float is declared: 1 and 1.0, which are equal, in the same way."""
    is_float = float in (get_args(kind) or (kind,)) and isinstance(value, Real)
    return float(value) if is_float else value  # type: ignore[arg-type]  # a Real
