"""What a policy's own docstring says about it, in parts: the one source of what the command line and the docs show."""

import dataclasses
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from gradkeel.policies.base import spec_value
from gradkeel.policies.spec.parse import COMPOSITES, REGISTRY


@dataclass(frozen=True)
class ParameterDescription:
    """One parameter of a policy: its name, its default as a spec string has it (None if required), and its meaning."""

    name: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class PolicyDescription:
    """One policy in words.

    Attributes:
        name: as in a spec string.
        class_name: as in Python.
        summary: one sentence.
        details: the paragraphs that follow it.
        formula: what is done to a gradient.
        spec: how it is written in a spec string: what is required in capitals, the rest with its default.
        parameters: in the order of the spec string.
        cost: passes over the gradients, and the size of the state.
        source: author, title, year.
    """

    name: str
    class_name: str
    summary: str
    details: str
    formula: str
    spec: str
    parameters: tuple[ParameterDescription, ...]
    cost: str
    source: str


def describe(policy: type[Any]) -> PolicyDescription:
    """Take the docstring of a named or composite policy class apart.

    Example:
        >>> describe(REGISTRY["smooth"]).formula
        'g <- g * c / (c + n) with n the norm of the scope and c = max_norm'
    """
    sections = _sections(inspect.getdoc(policy) or "")
    summary, _, details = sections[""].partition("\n\n")
    meanings = _meanings(sections.get("Args", ""))
    parameters = tuple(
        ParameterDescription(
            field.name,
            None if field.default is dataclasses.MISSING else spec_value(field.default),
            meanings[field.name],
        )
        for field in dataclasses.fields(policy)
    )
    return PolicyDescription(
        name=policy.spec_name,
        class_name=policy.__name__,
        summary=_line(summary),
        details="\n\n".join(_line(paragraph) for paragraph in details.split("\n\n")),
        formula=_line(sections["Formula"]),
        spec=_line(sections["Spec"]) if "Spec" in sections else _spec(policy.spec_name, parameters),
        parameters=parameters,
        cost=_line(sections["Cost"]),
        source=_line(sections["Source"]),
    )


def _spec(name: str, parameters: tuple[ParameterDescription, ...]) -> str:
    words = [p.name.upper() if p.default is None else f"{p.name}={p.default}" for p in parameters]
    return f"{name}:{','.join(words)}" if words else name


def descriptions() -> tuple[PolicyDescription, ...]:
    """Describe every policy that has a name, in the order in which they are listed."""
    return tuple(describe(policy) for policy in (*REGISTRY.values(), *COMPOSITES.values()))


def _sections(text: str) -> dict[str, str]:
    """Return the docstring's sections by title; what stands before the first has the title ''."""
    first, *others = re.split(r"^([A-Z][A-Za-z]+):$", text, flags=re.MULTILINE)
    found = {"": first, **dict(zip(others[::2], others[1::2], strict=True))}
    return {title: textwrap.dedent(body).strip("\n") for title, body in found.items()}


def _meanings(arguments: str) -> dict[str, str]:
    entries = re.split(r"^(\w+): ", arguments, flags=re.MULTILINE)[1:]
    return {name: _line(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
