"""What a record says of its run, its parameters and its layout."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Session:
    """A stretch of writing: a process that wrote to the record, or one that went back and recorded steps again.

    Attributes:
        started: when, in ISO 8601, UTC.
        first_step: the first step that it wrote.
        policy: spec of the main policy, or its repr where it has none.
        norm_type: the p of the main selection's norms.
        optimizer: name of the optimizer's class, or "" where it is not known.
        nonfinite: what the guard did with non-finite gradients, or "".
        gradkeel: version of gradkeel.
        torch: version of torch.
        number: of the session, from 1.
    """

    started: str
    first_step: int
    policy: str
    norm_type: float
    optimizer: str
    nonfinite: str
    gradkeel: str
    torch: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class Rollback:
    """A session that recorded steps again: a resume from a checkpoint, a run from scratch, a rollback in a run.

    Attributes:
        session: its number.
        started: when, in ISO 8601, UTC.
        step: the first step that was recorded again.
        last_step: the last step that had been recorded before.
        rows: how many steps it superseded; they stay in the file.
    """

    session: int
    started: str
    step: int
    last_step: int
    rows: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """What the record says of one parameter.

    Attributes:
        name: as the guard names it.
        shape: of the parameter.
        size: its number of entries.
        selection: "main", "group 0", ..., or "excluded".
        policy: repr of the policy that it is under, "None" where it is only measured.
        optimizer_group: index of its parameter group.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    selection: str
    policy: str
    optimizer_group: int


@dataclass(frozen=True, slots=True)
class Block:
    """Where a run of rows lies: ``rows`` steps from ``first_step`` to ``last_step``, the first ``width`` parameters.

    ``session`` wrote them, and ``superseded_by`` recorded them again; 0 where nobody has.
    """

    block: int
    first_step: int
    last_step: int
    rows: int
    width: int
    session: int
    superseded_by: int
