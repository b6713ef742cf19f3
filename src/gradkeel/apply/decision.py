"""The only code that writes to gradients: one multiplication by prescale x clip, and the clamp of the value scope."""

from collections.abc import Sequence

from torch import Tensor

from gradkeel.apply import device, host
from gradkeel.kernels.native import Table
from gradkeel.norms import Decision, GradientNorms, from_list


def apply(
    parameters: Sequence[Tensor],
    decision: Decision,
    measured: GradientNorms,
    *,
    prescale: Tensor | float,
    unit_dim: int | None = None,
) -> None:
    """Carry a decision out on the gradients of a selection, in place.

    Args:
        parameters: n parameters; those without a gradient are passed over.
        decision: what the policy wants.
        measured: the norms that it was decided on; tells where nothing is to be done.
        prescale: [] what turns the stored gradients into the true ones.
        unit_dim: the dimension that counts units, where the decision has unit coefficients.

    On CPU a gradient whose coefficient is exactly 1 is not touched. On an accelerator the host is not synced. Gradients
    that require gradients must be written to under ``torch.no_grad()``, as everything that calls this does.
    """
    scale(parameters, factors(decision, prescale))
    units = decision.unit_coefficients
    if units is not None:
        assert unit_dim is not None, "unit coefficients come with the dimension that counts units"
        scale_units = host.scale_units if units.device.type == "cpu" else device.scale_units
        scale_units(parameters, units, measured.unit_counts, unit_dim)
    if decision.clamp is not None:
        clamp(parameters, decision.clamp, _peaks_after(decision, measured))


def factors(decision: Decision, prescale: Tensor | float) -> Tensor | float | list[float]:
    """Prescale x clip: one factor for all parameters or [n] one for each; numbers where the host knows them."""
    factor = decision.known_coefficients
    if factor is None:
        factor = prescale
    elif not (isinstance(prescale, float) and prescale == 1.0):
        factor = (from_list(factor) if isinstance(factor, list) else factor) * prescale
    return factor.item() if isinstance(factor, Tensor) and factor.is_cpu and factor.dim() == 0 else factor


def scale(
    parameters: Sequence[Tensor], factor: Tensor | float | list[float], table: Table | None = None
) -> None:
    """Multiply the gradients of n parameters, where they have one, by a number or [], or n numbers or [n], in place.

    ``table``: where all of them lie, where that is known.
    """
    if isinstance(factor, Tensor):
        if not factor.is_cpu:
            device.scale(parameters, factor)
            return
        factor = factor.item() if factor.dim() == 0 else factor.tolist()
    host.scale(parameters, factor, table)


def clamp(parameters: Sequence[Tensor], limits: tuple[float, float], peaks: Tensor | None = None) -> None:
    """Clamp every entry of every gradient into ``limits``, in place; NaN stays.

    With ``peaks`` [n, 2], the lowest and highest entries, a gradient within the limits is not touched.
    """
    gradients = [parameter.grad for parameter in parameters]
    if any(gradient is not None and gradient.device.type != "cpu" for gradient in gradients):
        device.clamp(parameters, limits, peaks)
    else:
        host.clamp(parameters, limits, peaks)


def _peaks_after(decision: Decision, measured: GradientNorms) -> Tensor | None:
    """[n, 2] lowest and highest entries after the scaling that comes before the clamp; None where unknown."""
    if measured.peaks is None or decision.unit_coefficients is not None:
        return None
    return (
        measured.peaks
        if decision.coefficients is None
        else measured.peaks * decision.coefficients.reshape(-1, 1)
    )
