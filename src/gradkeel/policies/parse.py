"""From spec strings such as ``global-norm:0.25,norm_type=inf`` to policies, and nothing evaluated as code."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, get_type_hints

from gradkeel.errors import PolicySpecError
from gradkeel.policies.base import NamedPolicy, Policy
from gradkeel.policies.fixed import ClipByGlobalNorm, ClipByNorm, ClipByValue

REGISTRY: dict[str, type[NamedPolicy]] = {
    policy.spec_name: policy for policy in (ClipByValue, ClipByNorm, ClipByGlobalNorm)
}
ALIASES = {"tensor-norm": "norm"}


@dataclass(frozen=True)
class PolicySpec:
    """What a spec string says: a policy, or None for ``none``, and the patterns of what it leaves out."""

    policy: Policy | None
    exclude: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        """The canonical spec string."""
        spec = "none" if self.policy is None else self.policy.spec
        words = [f"exclude={pattern}" for pattern in self.exclude]
        return spec if not words else f"{spec}{',' if ':' in spec else ':'}{','.join(words)}"


def parse(spec: str) -> PolicySpec:
    """Read a policy spec: ``NAME[:ARGUMENT,...][,KEY=VALUE...][,exclude=PATTERN...]``.

    Args:
        spec: for instance ``none``, ``value:1.0``, ``value:-0.5,1``, ``norm:1.0,exclude=*.bias`` or
            ``global-norm:0.25,norm_type=inf``; ``exclude`` may stand several times.

    Raises:
        PolicySpecError: naming the spec, what is wrong with it, and the known names.

    Example:
        >>> parse("global-norm:0.25").policy
        ClipByGlobalNorm(max_norm=0.25)  # all tensors together
    """
    name, _, rest = spec.strip().partition(":")
    words = [word.strip() for word in rest.split(",")] if rest.strip() else []
    exclude = tuple(word.removeprefix("exclude=") for word in words if word.startswith("exclude="))
    words = [word for word in words if not word.startswith("exclude=")]
    if name == "none":
        if words or exclude:
            raise PolicySpecError(f"policy {spec!r}: 'none' takes no arguments")
        return PolicySpec(None)
    return PolicySpec(_build(spec, _known(spec, name), words), exclude)


def _known(spec: str, name: str) -> type[NamedPolicy]:
    try:
        return REGISTRY[ALIASES.get(name, name)]
    except KeyError:
        known = ["none", *sorted(REGISTRY)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PolicySpecError(f"unknown policy {spec!r}{hint} Known policies: {', '.join(known)}") from None


def _build(spec: str, policy: type[NamedPolicy], words: list[str]) -> NamedPolicy:
    hints = get_type_hints(policy)
    fields = [field.name for field in dataclasses.fields(policy)]
    positional = [word for word in words if "=" not in word]
    names = ["min", "max"] if policy is ClipByValue and len(positional) == 2 else fields
    if len(positional) > len(names):
        raise PolicySpecError(f"policy {spec!r}: too many arguments; it takes {', '.join(fields)}")
    given = dict(zip(names, positional, strict=False))
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            continue
        if key not in fields or key in given:
            problem = "is given twice" if key in given else f"is not one of {', '.join(fields)}"
            raise PolicySpecError(f"policy {spec!r}: argument {key!r} {problem}")
        given[key] = value
    try:
        return policy(**{key: _value(spec, key, value, hints[key]) for key, value in given.items()})
    except (TypeError, ValueError) as error:
        if isinstance(error, PolicySpecError):
            raise
        wanted = ", ".join(field.name for field in dataclasses.fields(policy) if field.default is dataclasses.MISSING)
        missing = "missing" in str(error) and "argument" in str(error)
        reason = f"it needs {wanted}, as in {policy.spec_name}:1.0" if missing else str(error)
        raise PolicySpecError(f"policy {spec!r}: {reason}") from None


def _value(spec: str, key: str, text: str, hint: Any) -> Any:
    kinds = getattr(hint, "__args__", (hint,))
    if text == "none" and type(None) in kinds:
        return None
    if bool in kinds and text in {"true", "false"}:
        return text == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds:
        return text
    raise PolicySpecError(f"policy {spec!r}: {key}={text!r} is not a number")
