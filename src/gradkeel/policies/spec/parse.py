"""From spec strings such as ``global-norm:0.25,norm_type=inf`` to policies, and nothing evaluated as code."""

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from gradkeel.errors import PolicySpecError, check_kind
from gradkeel.policies.base import Policy
from gradkeel.policies.compose.chain import Chain, Composite, Warmup
from gradkeel.policies.compose.groups import PerGroup
from gradkeel.policies.recipes import adaptive, clips, skip, smooth
from gradkeel.policies.recipes.named import NamedPolicy

_NAMED: tuple[type[NamedPolicy], ...] = (
    clips.ClipByGlobalNorm,
    clips.ClipByNorm,
    clips.ClipByValue,
    clips.AdaptiveGradientClip,
    clips.BlockRms,
    smooth.SmoothClip,
    smooth.Normalize,
    smooth.SmoothnessStep,
    adaptive.AutoClip,
    adaptive.QuantileClip,
    adaptive.ZClip,
    adaptive.RobustClip,
    adaptive.AdaGC,
    skip.SkipStep,
)
REGISTRY: dict[str, type[NamedPolicy]] = {policy.spec_name: policy for policy in _NAMED}
"""Every named policy by the name that it has in specs."""
COMPOSITES: dict[str, type[Composite]] = {kind.spec_name: kind for kind in (Chain, Warmup, PerGroup)}
"""Every policy that is made of policies, by name."""
ALIASES = {"tensor-norm": "norm"}

_EXCLUDE = r"\bexclude=([^,+/()]*)"


@dataclass(frozen=True)
class PolicySpec:
    """What a spec string says: a policy, or None for ``none``, and the patterns of what it leaves out."""

    policy: Policy | None
    exclude: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        """The canonical spec string."""
        spec = "none" if self.policy is None else self.policy.spec
        for pattern in self.exclude:
            spec += f"{',' if ':' in re.split('[+/]', spec)[-1] else ':'}exclude={pattern}"
        return spec


def parse(spec: str) -> PolicySpec:
    """Read a policy spec: ``NAME[:ARGUMENT,...][,KEY=VALUE...][,exclude=PATTERN...]``, or several joined by ``+``.

    ``STAGE+STAGE+...`` applies one after the other, ``warmup:STEPS/BEFORE/AFTER`` one until step STEPS and then the
    other, ``per-group:POLICY/POLICY/...`` one to each parameter group; inside one of these, another stands in
    parentheses. ``exclude`` may stand several times and holds for the whole policy.

    Args:
        spec: for instance ``none``, ``value:1.0``, ``value:-0.5,1``, ``norm:1.0,exclude=*.bias``,
            ``global-norm:0.25,norm_type=inf``, ``skip-step+zclip`` or ``warmup:100/global-norm:1.0/(skip-step+zclip)``.

    Raises:
        PolicySpecError: naming the spec, what is wrong with it, and the known names.
        TypeError: for what is no string.

    Example:
        >>> parse("global-norm:0.25").policy
        ClipByGlobalNorm(max_norm=0.25)  # all tensors together
    """
    rule = "spec must be a string such as 'global-norm:1.0', or 'none' for no clipping"
    check_kind(spec, str, "parse(spec=...)", rule)
    exclude = tuple(re.findall(_EXCLUDE, spec))
    # What separated an exclude from the rest may be left at the end of a stage.
    policy = _policy(spec, re.sub(r"[,:]+(?=[+/)]|$)", "", re.sub(rf"{_EXCLUDE},?", "", spec)))
    if policy is None and exclude:
        raise PolicySpecError(f"policy {spec!r}: 'none' takes no arguments")
    return PolicySpec(policy, exclude)


def _policy(spec: str, text: str) -> Policy | None:
    stages = _split(spec, text, "+")
    if len(stages) > 1:
        return _made(spec, Chain, *(_some(spec, stage) for stage in stages))
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        return _policy(spec, text[1:-1])
    name, _, rest = text.partition(":")
    name = name.strip()
    if name == "none":
        if rest:
            raise PolicySpecError(f"policy {spec!r}: 'none' takes no arguments")
        return None
    if name == Warmup.spec_name:
        words = _split(spec, rest, "/")
        if len(words) != 3:
            raise PolicySpecError(
                f"policy {spec!r}: write it as warmup:STEPS/BEFORE/AFTER, such as warmup:100/global-norm:1.0/zclip"
            )
        steps = _value(spec, "steps", words[0], int)
        return _made(spec, Warmup, steps, *(_policy(spec, word) for word in words[1:]))
    if name == PerGroup.spec_name:
        return _made(spec, PerGroup, *(_policy(spec, word) for word in _split(spec, rest, "/")))
    words = [word.strip() for word in rest.split(",")] if rest.strip() else []
    return _build(spec, _known(spec, name), words)


def _some(spec: str, text: str) -> Policy:
    policy = _policy(spec, text)
    if policy is None:
        raise PolicySpecError(f"policy {spec!r}: 'none' has no place in a chain; leave it out")
    return policy


def _split(spec: str, text: str, separator: str) -> list[str]:
    """Split ``text`` at separators outside of parentheses; the + of 1e+5 is none."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0 and not re.search(r"[\d.][eE]$", text[:i]):
            parts.append(text[start:i])
            start = i + 1
    if depth != 0:
        raise PolicySpecError(f"policy {spec!r}: its parentheses do not match")
    return [*parts, text[start:]]


def _made(spec: str, kind: type[Policy], *arguments: Any, **named: Any) -> Policy:
    try:
        return kind(*arguments, **named)
    except (TypeError, ValueError) as error:
        raise PolicySpecError(f"policy {spec!r}: {error}") from None


def _known(spec: str, name: str) -> type[NamedPolicy]:
    try:
        return REGISTRY[ALIASES.get(name, name)]
    except KeyError:
        known = ["none", *sorted(REGISTRY), Warmup.spec_name, PerGroup.spec_name]
        near = difflib.get_close_matches(name, known, n=1)
        raise PolicySpecError(
            f"unknown policy {name!r}{'' if name == spec.partition(':')[0] else f' in {spec!r}'}"
            f"{f'; did you mean {near[0]!r}?' if near else '.'} "
            f"Known policies: {', '.join(known)}, and chains of them, joined by +"
        ) from None


def _build(spec: str, policy: type[NamedPolicy], words: list[str]) -> Policy:
    hints = get_type_hints(policy)
    fields = dataclasses.fields(policy)
    given = _arguments(spec, [field.name for field in fields], words, policy)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in given]
    if missing:
        example = ",".join(["1.0"] * len(required))
        raise PolicySpecError(
            f"policy {spec!r}: it needs {', '.join(missing)}, as in {policy.spec_name}:{example}"
        )
    return _made(spec, policy, **{key: _value(spec, key, value, hints[key]) for key, value in given.items()})


def _arguments(spec: str, fields: list[str], words: list[str], policy: type[NamedPolicy]) -> dict[str, str]:
    positional = [word for word in words if "=" not in word]
    names = ["min", "max"] if policy is clips.ClipByValue and len(positional) == 2 else fields
    if len(positional) > len(names):
        raise PolicySpecError(f"policy {spec!r}: too many arguments; it takes {', '.join(fields)}")
    given = dict(zip(names, positional, strict=False))
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            continue
        if key not in fields or key in given:
            problem = "is given twice" if key in given else f"is not one of {', '.join(fields)}"
            raise PolicySpecError(f"policy {spec!r}: argument {key!r} {problem}")
        given[key] = value
    return given


def _value(spec: str, key: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if text in kinds:  # one of a Literal's words
        return text
    # None and True, as they are written in Python and in this project's own documentation.
    word = text.lower()
    if word == "none" and type(None) in kinds:
        return None
    if bool in kinds and word in {"true", "false"}:
        return word == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    words = ["true", "false"] if bool in kinds else [kind for kind in kinds if isinstance(kind, str)]
    number = "a number" if float in kinds else "a whole number"
    wanted = f"one of {', '.join(words)}" if words else number
    raise PolicySpecError(f"policy {spec!r}: {key}={text!r} is not {wanted}")
