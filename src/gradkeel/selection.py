"""Which parameters a policy is for: names, exclude patterns, and overrides by parameter group."""

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from torch import Tensor, nn

from gradkeel.errors import SelectionError
from gradkeel.policies import Policy, parse
from gradkeel.tensors import are_distributed

Exclude = str | nn.Module | Tensor | Callable[[str, Tensor], bool]
"""A name pattern (``*.bias``), a module, a parameter, or a predicate of name and parameter."""

MAIN, EXCLUDED = "main", "excluded"

_WRAPPED = re.compile(r"(?<!\w)(_orig_mod|_fsdp_wrapped_module|_forward_module)\.")

Groups = Sequence[dict[str, Any]]
"""Parameter groups as an optimizer holds them."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The parameters that one policy looks at together."""

    label: str  # "main", "group 0", ..., or "excluded"
    names: tuple[str, ...]  # the parameters' names
    parameters: tuple[Tensor, ...]  # the parameters, in the optimizer's order, each once
    groups: tuple[int, ...]  # their group indices in the optimizer

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The parameters' numbers of entries."""
        return tuple(parameter.numel() for parameter in self.parameters)

    @cached_property
    def is_distributed(self) -> bool:
        """Whether any parameter, and so its gradient, is a DTensor."""
        return are_distributed(self.parameters)

    @cached_property
    def all_present(self) -> tuple[bool, ...]:
        """Which parameters have a gradient, where all of them do."""
        return (True,) * len(self.parameters)

    def units(self, dim: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How many units along ``dim`` each parameter has, and how many entries a unit; empty where dim is None.

        A parameter with at most one dimension is one unit.
        """
        if dim is None:
            return (), ()
        counts = tuple(1 if p.dim() <= 1 else p.shape[dim] for p in self.parameters)
        return counts, tuple(size // max(1, count) for size, count in zip(self.sizes, counts, strict=True))


def name_parameters(groups: Groups, model: nn.Module | None) -> dict[int, str]:
    """Name of each of the optimizer's parameters, by ``id``; each another one.

    From the optimizer's own ``param_names`` where it was built from named parameters, else from ``model``, else its
    position in the optimizer as a string. Equal ones, as of two networks, are numbered: ``0.weight``, ``1.weight``.
    """
    known = {} if model is None else {id(p): plain(name) for name, p in model.named_parameters()}
    names: dict[int, str] = {}
    position = 0
    for group in groups:
        own = group.get("param_names") or [""] * len(group["params"])
        for parameter, own_name in zip(group["params"], own, strict=True):
            names.setdefault(id(parameter), plain(own_name) or known.get(id(parameter)) or str(position))
            position += 1
    return _told_apart(names)


def plain(name: str) -> str:
    """A parameter's name, or a pattern of names, without what torch.compile, FSDP1 and Fabric put into it."""
    return _WRAPPED.sub("", name)


def _told_apart(names: dict[int, str]) -> dict[int, str]:
    counts = Counter(names.values())
    taken, number = set(counts), Counter[str]()
    for key, name in names.items():
        if counts[name] > 1:
            while (numbered := f"{number[name]}.{name}") in taken:
                number[name] += 1
            names[key] = numbered
            taken.add(numbered)
    return names


def select(
    groups: Groups,
    names: Mapping[int, str],
    exclude: Iterable[Exclude] = (),
    model: nn.Module | None = None,
) -> tuple[Selection, ...]:
    """Split the optimizer's parameters: main selection first, groups with their own ``"clip"``, excluded ones last.

    The main and the excluded selection are always there, empty or not. A parameter group's key ``"clip"`` takes the
    group out of the main selection: None excludes it. A pattern of ``exclude`` may match parameters of the ``model``
    that are not in the optimizer.

    Raises:
        SelectionError: for an entry that selects nothing, listing near names.
    """
    entries = _entries(groups)
    left_out = _excluded(entries, names, tuple(exclude), model)
    chosen: dict[str, list[tuple[Tensor, int]]] = {MAIN: []}
    excluded: list[tuple[Tensor, int]] = []
    for parameter, index in entries:
        group = groups[index]
        if id(parameter) in left_out or ("clip" in group and group["clip"] is None):
            excluded.append((parameter, index))
        else:
            chosen.setdefault(f"group {index}" if "clip" in group else MAIN, []).append((parameter, index))
    chosen[EXCLUDED] = excluded
    return tuple(
        Selection(
            label,
            tuple(names[id(parameter)] for parameter, _ in members),
            tuple(parameter for parameter, _ in members),
            tuple(index for _, index in members),
        )
        for label, members in chosen.items()
    )


def _entries(groups: Groups) -> list[tuple[Tensor, int]]:
    """Each parameter once, with the index of its group; a tied parameter is one parameter."""
    seen: dict[int, tuple[Tensor, int]] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            seen.setdefault(id(parameter), (parameter, index))
    return list(seen.values())


def _excluded(
    entries: Sequence[tuple[Tensor, int]],
    names: Mapping[int, str],
    exclude: tuple[Exclude, ...],
    model: nn.Module | None,
) -> set[int]:
    known = [names[id(parameter)] for parameter, _ in entries]
    elsewhere = [plain(name) for name, _ in model.named_parameters()] if model is not None else []
    result: set[int] = set()
    for entry in exclude:
        found = {id(parameter) for parameter, _ in entries if matches(entry, names[id(parameter)], parameter)}
        if not found and not (isinstance(entry, str) and fnmatch.filter(elsewhere, plain(entry))):
            raise SelectionError(_nothing_matches(entry, known))
        result |= found
    return result


def matches(entry: Exclude, name: str, parameter: Tensor, argument: str = "exclude") -> bool:
    """Whether an entry of ``argument`` means this parameter.

    Raises:
        SelectionError: for an entry of another kind.
    """
    if isinstance(entry, str):
        return fnmatch.fnmatchcase(name, plain(entry))
    if isinstance(entry, nn.Module):
        return any(parameter is own for own in entry.parameters())
    if isinstance(entry, Tensor):
        return parameter is entry
    if callable(entry):
        return bool(entry(name, parameter))
    raise SelectionError(
        f"{argument}={entry!r}: each entry must be a name pattern, a module, a parameter, or a predicate "
        f"of (name, parameter), not {type(entry).__name__}"
    )


def _nothing_matches(entry: Exclude, known: Sequence[str]) -> str:
    if not isinstance(entry, str):
        shown = type(entry).__name__ if isinstance(entry, nn.Module | Tensor) else repr(entry)
        return f"exclude: {shown} selects none of the optimizer's parameters"
    if all(name.isdigit() for name in known):
        return (
            f"exclude={entry!r} matches no parameter, for the parameters have no names; pass model=, or build the "
            "optimizer from model.named_parameters()"
        )
    near = difflib.get_close_matches(entry, known, n=3, cutoff=0.3) or list(known[:3])
    return f"exclude={entry!r} matches no parameter; near names: {', '.join(near)}"


def group_policy(group: dict[str, Any], index: int) -> Policy | None:
    """The policy of a parameter group's ``"clip"`` key, which is rewritten as its spec string.

    The string is what goes into ``optimizer.state_dict()``, so that it loads with ``weights_only=True``.
    """
    clip = group.get("clip")
    if clip is None:
        return None
    if isinstance(clip, str):
        spec = parse(clip)
        if spec.policy is None or spec.exclude:
            raise SelectionError(
                f"parameter group {index}: 'clip'={clip!r} must name a policy and nothing else; pass None to leave the "
                "group unclipped, and exclude= to attach() for single parameters"
            )
        return spec.policy
    if isinstance(clip, Policy):
        group["clip"] = clip.spec
        return clip
    raise SelectionError(
        f"parameter group {index}: 'clip' must be a policy, a spec string such as 'norm:1.0', or None, "
        f"not {type(clip).__name__}"
    )


def learning_rate(group: Mapping[str, Any]) -> float | Tensor | None:
    """A parameter group's learning rate, [] where an accelerator has it; None where it is not one number."""
    rate = group.get("lr")
    if type(rate) is float:
        return rate
    if isinstance(rate, Tensor):
        if rate.numel() != 1:
            return None
        return float(rate) if rate.is_cpu else rate
    return float(rate) if isinstance(rate, Real) else None


def restore_clips(groups: Groups, before: Iterable[tuple[int, Any]]) -> None:
    """Give groups back the ``"clip"`` that loading a checkpoint without one took away; ``before``: their signature."""
    for group, (_, clip) in zip(groups, before, strict=False):
        if clip != MAIN:
            group.setdefault("clip", clip)


def signature(groups: Groups) -> tuple[tuple[int, Any], ...]:
    """What must stay the same for a selection to stay valid; cheap enough to compare at each step."""
    return tuple((len(group["params"]), group.get("clip", MAIN)) for group in groups)
