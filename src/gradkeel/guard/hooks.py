"""The optimizer's side of a guard: step hooks, closures, marks that must leave no trace, and who listens."""

import contextlib
import functools
import inspect
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gradkeel.errors import AttachError, RecordWarning, UnguardedCopyWarning
from gradkeel.guard import gate, stack
from gradkeel.guard.closure import AbandonedStepError, Closure
from gradkeel.guard.prescale import LossScale, put_back, set_attribute, take_loss_scale
from gradkeel.guard.report import Recorder, StepReport
from gradkeel.ranks.group import is_running
from gradkeel.selection import learning_rate
from gradkeel.tensors import entries_to_read

MARK = "_gradkeel_guard"
_AMP_FLAG = "_step_supports_amp_scaling"


def _outside_of_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    why = {"reason": "gradkeel measures and decides outside of the graph; compile without fullgraph=True"}
    takes_it = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.7 on
    disabled = torch.compiler.disable(hook, **why if takes_it else {})
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)
    if callback is None:
        return disabled

    def outside(*args: Any) -> Any:
        # Where nothing is compiled, as almost always, there is nothing to turn off.
        is_watched = torch.compiler.is_compiling() or callback() is not None
        return disabled(*args) if is_watched else hook(*args)

    return outside


class Calls(NamedTuple):
    """What is called around a step."""

    begin: Callable[..., None]  # first in each step
    # Once the gradients of the step are there: at once, or after each evaluation of the closure; returns whether the
    # step is to be made. Where it is not, the optimizer's own step is not run.
    evaluate: Callable[[], bool]
    fail: Callable[[], None]  # where the optimizer's own step raises, or somebody else's hook may
    finish: Callable[[], None]  # after the step


class Hooks:
    """Calls a guard around ``optimizer.step()``, and after each evaluation of the closure where there is one.

    The ``guard`` is left on the optimizer as a mark, so that a second one can be refused.

    Attributes:
        loss_scale: what a GradScaler set on the optimizer for the step under way.
        own: the attributes that gradkeel itself has set for the optimizer's kernel; a step that raises leaves them.
    """

    def __init__(self, optimizer: Optimizer, guard: object, calls: Calls) -> None:
        self.optimizer, self._guard = optimizer, guard
        self._begin, self._evaluate, self._fail, self._finish = calls
        # Of the optimizer's own step: a subclass's may call its parent's, and torch runs the hooks for each of the two.
        self._is_inside = False
        self._is_made = True
        self.loss_scale = LossScale()
        self.own: dict[str, Tensor] = {}
        self._closure: Closure | None = None
        # Of its closure, until one has left some. Ranks, which must raise together, may not all have one.
        self._expects_gradient = not is_running()
        # Before how many steps by closure parameters and state are copied, until it is known that they need not be.
        # Torch's optimizers evaluate before they move, all but LBFGS.
        is_known = type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, LBFGS)
        self._copies = 0.0 if is_known else 10.0
        gate.close(optimizer, self)
        self._kept_flag = vars(optimizer).get(_AMP_FLAG)
        self._handles = [
            optimizer.register_step_pre_hook(_outside_of_graphs(self._before)),
            optimizer.register_step_post_hook(_outside_of_graphs(self._after)),
        ]
        # Makes GradScaler call step() on every step, with its scale and verdict as attributes.
        setattr(optimizer, _AMP_FLAG, True)
        setattr(optimizer, MARK, guard)
        # Copying and pickling both go through __getstate__, and both lose hooks.
        optimizer.__getstate__ = self._getstate  # type: ignore[method-assign]  # looked up on the instance
        self._refusing = [name for name in ("first_step", "second_step") if hasattr(type(optimizer), name)]
        for name in self._refusing:
            setattr(optimizer, name, self._inside_of_steps(name))

    def remove(self) -> None:
        """Leave no hook and no attribute behind; what another guard has left since stays."""
        for handle in self._handles:
            handle.remove()
        if vars(self.optimizer).get(MARK) is not self._guard:
            return
        gate.remove(self.optimizer)
        for name in ("__getstate__", *self._refusing):
            vars(self.optimizer).pop(name, None)
        if self._kept_flag is None:
            vars(self.optimizer).pop(_AMP_FLAG, None)
        else:
            setattr(self.optimizer, _AMP_FLAG, self._kept_flag)
        vars(self.optimizer).pop(MARK)

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() != -1:
            raise AttachError(
                "optimizer.step() was called inside backward(): accumulation, global norms and skipping need the "
                "whole gradient first; step after backward(), or detach() the guard"
            )
        if self._is_inside:
            return None
        self._is_made = True
        self._begin()
        self.loss_scale, self.own = take_loss_scale(optimizer, self.own), {}
        # What some optimizers take in this place is no closure: a Hessian's diagonal, a learning rate, options.
        is_by_place = len(args) > 1 and callable(args[1])
        closure = args[1] if is_by_place else kwargs.get("closure")
        if closure is None:
            self._is_made = self._evaluate()
            if next(reversed(optimizer._optimizer_step_pre_hooks)) != self._handles[0].id:
                self._fail()  # as a hook that comes after this one may, before anybody hears of it
            return None
        self._closure = Closure(
            optimizer,
            closure,
            self._evaluate,
            copies=self._copies > 0,
            expects_gradient=self._expects_gradient,
        )
        if is_by_place:
            return (args[0], self._closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": self._closure}

    def give(self, name: str, value: Tensor) -> None:
        """Set what the optimizer's fused kernel reads."""
        set_attribute(self.optimizer, name, value)
        self.own[name] = value

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the optimizer's own step, between the hooks, unless it is to be skipped."""
        if not self._is_made:
            return None
        if self._is_inside:
            return own(*args, **kwargs)
        closure = self._closure
        self._is_inside = True
        try:
            result = own(*args, **kwargs)
            if closure is not None and closure.moves_last():
                self._copies -= 1
        except AbandonedStepError:
            assert closure is not None
            result = closure.loss
        except BaseException:
            if closure is None:
                self._fail()
            raise
        finally:
            self._is_inside = False
            if closure is not None:
                self._closure, self._expects_gradient = None, closure.expects_gradient
                if closure.has_moved:
                    self._copies = math.inf
                closure.put_back()
        return result

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_inside:
            return
        if self.loss_scale.present or self.own:
            put_back(optimizer, self.loss_scale)
            self.own = {}
        self._finish()

    def _inside_of_steps(self, name: str) -> Callable[..., Any]:
        """The half of a step that this name stands for, refused where no ``optimizer.step()`` is under way."""
        half = getattr(self.optimizer, name)
        kind = type(self.optimizer).__name__

        @functools.wraps(half)
        def refusing(*args: Any, **kwargs: Any) -> Any:
            if not self._is_inside:
                raise AttachError(
                    f"{kind}.{name}() moves parameters without optimizer.step(), which is what the guard sees; call "
                    "optimizer.step(closure), or attach to the optimizer inside, whose step() the second half calls"
                )
            return half(*args, **kwargs)

        return refusing

    def _getstate(self) -> dict[str, Any]:
        warnings.warn(
            "a copy or pickle of this optimizer carries no gradkeel guard and would train unclipped; attach a guard "
            "to the copy",
            UnguardedCopyWarning,
            stacklevel=3,
        )
        with self._hidden():
            state = type(self.optimizer).__getstate__(self.optimizer)
            return dict(state) if state is vars(self.optimizer) else state

    @contextlib.contextmanager
    def _hidden(self) -> Iterator[None]:
        """Meanwhile the optimizer's attributes are as without a guard: some classes copy all of them."""
        own = vars(self.optimizer)
        marks = (MARK, gate.ATTRIBUTE, _AMP_FLAG, "__getstate__", *self._refusing)
        hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        kept = {name: own.pop(name) for name in (*marks, *hooks) if name in own}
        if self._kept_flag is not None:
            own[_AMP_FLAG] = self._kept_flag
        for name, handle in zip(hooks, self._handles, strict=True):
            own[name] = OrderedDict((i, hook) for i, hook in kept[name].items() if i != handle.id)
        try:
            yield
        finally:
            own.update(kept)


def tell(recorders: list[Recorder], event: str, report: StepReport) -> None:
    """Call each recorder's method of this name; one that raises is dropped with a warning, for training goes on.

    Of several ranks the one that recorded would otherwise not make the step that the others make.
    """
    for recorder in tuple(recorders):
        try:
            getattr(recorder, event, _nobody)(report)
        except Exception as error:  # noqa: BLE001  # whatever a disk or a tracker does
            recorders.remove(recorder)
            warnings.warn(
                f"recording stopped at step {report.step}: {recorder!r} raised {error!r}; training goes on",
                RecordWarning,
            )


def _nobody(report: StepReport) -> None:
    """Stands for what a recorder need not have."""


def only_creates_state(optimizer: Optimizer, parameters: Sequence[Tensor], *, alone: bool) -> bool:
    """Whether this step only makes the optimizer create its state: no state yet, every lr 0, every gradient 0.

    ``torch.distributed.checkpoint.state_dict`` makes such steps. They must run, and nobody needs to hear of them.
    """
    if any(optimizer.state.values()):
        return False
    for group in optimizer.param_groups:
        rate = learning_rate(group)
        if not isinstance(rate, float) or rate != 0.0:
            return False
    if any(p.grad is not None and bool(entries_to_read(p.grad).any()) for p in parameters):
        return False
    # A rank's own zeros tell nothing of the others' gradients; who calls is the same on all of them.
    return alone or stack.is_inside("_init_optim_state")
