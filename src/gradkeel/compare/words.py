"""Numbers and policy specs as people read them."""

import math

from gradkeel.language import Said, readable, say
from gradkeel.policies import parse

_BOUNDED = {"global-norm", "norm", "tensor-norm", "value", "block-rms", "smooth"}


def number(value: float | None) -> str:
    """Four significant digits; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else readable(value, 4)


def capital(text: str) -> str:
    """The text with its first letter in upper case, unless it begins with a policy's name."""
    if ":" in text.split(" ", 1)[0]:
        return text
    english = text[:1].upper() + text[1:]
    return Said(english, text.template, text.values) if isinstance(text, Said) else english


def named(policy: str) -> str:
    """The policy as a sentence has it: "none" would be read as a number."""
    return say("unclipped training") if is_unclipped(policy) else policy


def is_unclipped(policy: str) -> bool:
    """Whether the spec clips nothing."""
    return parse(policy).policy is None


def without_exclude(policy: str) -> str:
    """The spec without its ``exclude=`` words."""
    name, _, rest = policy.partition(":")
    words = [word for word in rest.split(",") if not word.strip().startswith("exclude=")]
    return f"{name}:{','.join(words)}" if any(words) else name


def bound_of(policy: str) -> float | None:
    """The bound of a spec that has a constant one as its first argument, and None for any other."""
    name, _, rest = policy.partition(":")
    first, *others = rest.split(",")
    if name not in _BOUNDED or any("=" not in word for word in others):
        return None
    try:
        return float(first)
    except ValueError:
        return None
