"""`attach`: the one line that a training script needs."""

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradkeel.errors import AttachError, GradkeelWarning, PolicySpecError, check_kind
from gradkeel.guard.guard import Guard
from gradkeel.guard.hooks import MARK
from gradkeel.guard.pipeline import NonFinite
from gradkeel.guard.report import Recorder
from gradkeel.guard.wrappers import unwrap
from gradkeel.policies import Policy, parse
from gradkeel.ranks.declared import ShardOver, Sharing
from gradkeel.ranks.group import Group
from gradkeel.selection import Exclude

POLICY_VARIABLE = "GRADKEEL_POLICY"
RECORD_VARIABLE = "GRADKEEL_RECORD"
SEED_VARIABLE = "GRADKEEL_SEED"


def ignore_environment() -> None:
    """Let this process's calls of `attach` say what is done, whatever the environment has."""
    for variable in (POLICY_VARIABLE, RECORD_VARIABLE):
        os.environ.pop(variable, None)


def attach(
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy | str | None,
    *,
    model: nn.Module | None = None,
    exclude: Iterable[Exclude] | Exclude | None = None,
    nonfinite: NonFinite = "skip",
    max_consecutive_skips: int = 10,
    record: Recorder | str | os.PathLike[str] | None = None,
    process_group: "Group | None" = None,
    shard_over: ShardOver | None = None,
) -> Guard:
    """Guard an optimizer: from now on every ``optimizer.step()`` clips first, and skips what is not finite.

    Works through the optimizer's step hooks, so the rest of the loop stays as it is: closures, LR schedulers,
    GradScaler, Lightning, the HF Trainer and Accelerate included.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or Accelerate's or Lightning's wrapper of one (of others that wrap an
            optimizer the outer one is guarded); or a list of several that step on the gradients of one backward pass,
            such as Muon and AdamW: they have one norm, one verdict and one record, each steps once a round, and the
            first to step decides. A parameter group's key ``"clip"`` overrides the policy for the group: another
            policy, a spec string, or None.
        policy: what to do to large gradients; a spec string such as ``"global-norm:1.0"`` is read with
            ``gradkeel.policies.spec.parse``; None measures and reports only.
        model: gives the parameters the names of ``model.named_parameters()``. Not needed where the optimizer was
            built from named parameters.
        exclude: what the policy leaves alone: name patterns (``"*.bias"``), modules, parameters, or predicates of
            (name, parameter). Excluded gradients count in no norm, but in the non-finite check.
        nonfinite: what happens at a NaN or inf gradient. "skip" leaves parameters, moments, counters and policy
            state bit-identical, and says so once; "raise" raises before anything is modified; "keep" steps on.
        max_consecutive_skips: more skips than this in a row raise, with their reasons; at least 1.
        record: where to record every step: a path, or a `Recorder`.
        process_group: the ranks that decide together, as a process group or a device mesh. None takes those of
            the meshes on which DTensors are sharded (FSDP2, HSDP, tensor parallel). Plain parameters, alike on all
            ranks of the job as DDP has them, need no exchange, unless the policy looks at the loss: then all ranks
            decide on the mean of theirs. A rank that trains on its own passes a group of its own. A plain parameter
            counts once, however many ranks have it by its name.
        shard_over: what plain parameters cannot tell themselves: for name patterns, modules, parameters or
            predicates, as in ``exclude``, the group over whose ranks each is split (expert parallel, pipeline
            stages), or ``(group, dim)``. Parameters of one name are pieces of one tensor. The name of another
            parameter makes one its copy, as of a weight tied across pipeline stages; None says that it is not split
            after all. Later entries override earlier ones.

    Returns:
        The `Guard`: ``guard.report`` tells what the last step came to.

    Raises:
        AttachError: if the optimizer is differentiable, steps inside backward, has lazy parameters without a shape,
            never called ``Optimizer.__init__``, or holds one that is guarded.
        SelectionError: if an ``exclude`` entry selects nothing.
        RankError: if another rank could not attach, has another policy, or has not called it within two minutes.
        TypeError, ValueError: for arguments of another kind.

    An optimizer that is guarded already is taken over, as when a cell of a notebook runs again: the old guard is
    detached, its open accumulation window is dropped, and the new one goes on from its step and, under the same
    policies, its statistics; where it has the same ``record``, that goes on too.

    The environment variable ``GRADKEEL_POLICY`` (a spec string) overrides ``policy`` and ``exclude``, and
    ``GRADKEEL_RECORD`` (a path) ``record``, which a warning says: so does ``gradkeel compare --run``, in silence, with
    a script that it must not change.

    All ranks of a distributed job must call it, or those of ``process_group``: they compare what they have.

    On CPU the host decides; with a fused optimizer on an accelerator no step syncs the host.

    Example:
        >>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    """
    optimizers = [unwrap(one) for one in (optimizer if isinstance(optimizer, list | tuple) else [optimizer])]
    sharing = Sharing(process_group, shard_over, nonfinite)
    try:
        _check_kinds(model, exclude)
        _check(optimizers, nonfinite, max_consecutive_skips)
        policy, exclude = _read(policy, exclude)
        record = _checked_record(_from_environment(RECORD_VARIABLE) or record)
    except Exception as error:
        sharing.fail(_parameters(optimizers), None, error)
        raise
    if model is not None:
        _warn_of_strangers(optimizers, model)
    guard = Guard(
        optimizers,
        policy,
        model=model,
        exclude=exclude,
        nonfinite=nonfinite,
        max_consecutive_skips=max_consecutive_skips,
        sharing=sharing,
        summarize=_summary,
    )
    try:
        if record is not None:
            _record(guard, record)
    except BaseException:
        guard.detach()
        raise
    return guard


def _read(
    policy: Policy | str | None, exclude: Iterable[Exclude] | Exclude | None
) -> tuple[Policy | None, Iterable[Exclude]]:
    """The policy that a spec string, or the environment, names, with what it leaves alone."""
    if isinstance(policy, str):
        spec = parse(policy)
        if spec.exclude and exclude is not None:
            raise ValueError(
                f"attach(policy={policy!r}, exclude=...): say what is excluded in one place only"
            )
        policy, exclude = spec.policy, spec.exclude or exclude
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(
            f"attach(policy={policy!r}): policy must be a policy such as ClipByGlobalNorm(1.0), a spec string such as "
            f"'global-norm:1.0', or None to measure only, not {type(policy).__name__}"
        )
    if words := _from_environment(POLICY_VARIABLE):
        try:
            given = parse(words)
        except PolicySpecError as error:
            raise PolicySpecError(f"{POLICY_VARIABLE}={words}, in the environment: {error}") from None
        policy, exclude = given.policy, given.exclude
    if isinstance(exclude, str | nn.Module | Tensor) or callable(exclude):
        exclude = (exclude,)
    return policy, () if exclude is None else exclude


def _from_environment(variable: str) -> str | None:
    """The variable's value, said in a warning unless ``gradkeel compare`` has set it; None where it is empty."""
    value = os.environ.get(variable)
    if value and not {POLICY_VARIABLE, RECORD_VARIABLE, SEED_VARIABLE} <= os.environ.keys():
        warnings.warn(
            f"the environment has {variable}={value}, which takes the place of what the script says; "
            f"if that is not wanted: unset {variable}",
            GradkeelWarning,
            stacklevel=3,
        )
    return value or None


def _checked_record(record: object) -> Any:
    """The record as it was given, if it is a path or a recorder; else an error, before anything is guarded."""
    if record is None or (callable(getattr(record, "record", None)) and not isinstance(record, type)):
        return record
    from gradkeel.record.recorder import check_path

    return check_path(record, "attach(record=...)")


def _summary(guard: Guard) -> str:
    from gradkeel.explain import explain
    from gradkeel.record import Recorder as FileRecorder

    for recorder in guard.recorders:
        if isinstance(recorder, FileRecorder) and recorder.path is not None:
            if recorder.rank:
                return f"rank {recorder.rank}: rank 0 has the summary"
            recorder.flush()
            return str(explain(recorder.path))
    raise ValueError("guard.summary() reads the run's record; attach with record='runs/exp1.keel'")


def _record(guard: Guard, record: Recorder | str | os.PathLike[str]) -> None:
    if isinstance(record, str | os.PathLike):
        from gradkeel.record import Recorder as FileRecorder

        record = FileRecorder(record)
    bind = getattr(record, "bind", None)
    if bind is not None:
        bind(guard)
    guard.recorders.append(record)


def _check_kinds(model: object, exclude: object) -> None:
    check_kind(model, nn.Module | None, "attach(model=...)", "model must be a torch.nn.Module")
    if exclude is not None and not isinstance(exclude, Iterable) and not callable(exclude):
        raise TypeError(
            "attach(exclude=...): exclude must be a name pattern, a module, a parameter or a predicate, or a list of "
            f"them, not {type(exclude).__name__}"
        )


def _check(optimizers: Sequence[Optimizer], nonfinite: str, max_consecutive_skips: int) -> None:
    if not optimizers:
        raise ValueError("attach(optimizer=[]): give at least one optimizer")
    held = [own for one in optimizers for own in vars(one).values() if isinstance(own, Optimizer)]
    if any(hasattr(own, MARK) for own in held):
        raise AttachError(
            "attach(optimizer=...): the optimizer inside of it is guarded already; call detach() on its guard first"
        )
    before = [guard for one in optimizers if (guard := getattr(one, MARK, None)) is not None]
    if not {id(one) for guard in before for one in guard.optimizers} <= set(map(id, optimizers)):
        raise AttachError(
            "attach(optimizer=...): it is guarded together with other optimizers, which would be left without a guard; "
            "attach to all of them again, or call detach() on their guard first"
        )
    if nonfinite not in ("skip", "raise", "keep"):
        raise ValueError(f"attach(nonfinite={nonfinite!r}): nonfinite must be 'skip', 'raise' or 'keep'")
    if isinstance(max_consecutive_skips, bool) or not isinstance(max_consecutive_skips, int):
        raise TypeError(
            f"attach(max_consecutive_skips={max_consecutive_skips!r}): must be an int, at least 1"
        )
    if max_consecutive_skips < 1:
        raise ValueError(f"attach(max_consecutive_skips={max_consecutive_skips!r}): must be at least 1")
    owners = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    if len(set().union(*owners)) < sum(map(len, owners)):
        raise AttachError(
            "attach(optimizer=[...]): some parameter is in more than one of the optimizers, or an optimizer is given "
            "twice; each parameter must be stepped by one"
        )
    if any(group.get("differentiable") for one in optimizers for group in one.param_groups):
        raise AttachError(
            "attach(optimizer=...): differentiable=True lets gradients flow through the step, and what the guard does "
            "to them would be no part of that graph; scale them in the graph yourself, as in "
            "p.grad = p.grad * (bound / norm).clamp(max=1), or pass differentiable=False"
        )
    parameters = _parameters(optimizers)
    if any(map(is_lazy, parameters)):
        raise AttachError(
            "attach(optimizer=...): a lazy parameter has no shape yet, as of nn.LazyLinear; run one batch through the "
            "model, then attach"
        )
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters):
        raise AttachError(
            "attach(optimizer=...): its parameters are stepped inside backward() (optimizer-in-backward), where no "
            "whole gradient ever exists to be measured; build the optimizer without it"
        )


def _parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def _warn_of_strangers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Warn of parameters that model may have had, and has others in their place; a loss's own are no such."""
    known, own = {id(p): p for p in model.parameters()}, {id(p) for p in _parameters(optimizers)}
    strangers = len(own - known.keys())
    is_another = own.isdisjoint(known) or any(p.requires_grad and i not in own for i, p in known.items())
    if strangers and is_another:
        warnings.warn(
            f"{strangers} of the optimizer's parameters are not in model, and some of the model's are not in the "
            "optimizer; if the model was sharded or changed after the optimizer was built, build the optimizer "
            "afterwards; if they are another module's, such as a loss's, give both: "
            "model=nn.ModuleDict({'model': model, 'loss': loss})",
            GradkeelWarning,
            stacklevel=3,
        )
