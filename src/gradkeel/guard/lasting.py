"""Policies' states in a CUDA graph of the user's own, whose replays read and write them where they lie."""

from collections.abc import Mapping

from torch import Tensor

from gradkeel.norms import State


class Lasting:
    """Memory that states stay in from the first captured step on, for a graph holds addresses and owns nothing.

    Nobody else hears of a replay: what it leaves in this memory is the state that the next step begins with.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    def begun(self, states: Mapping[str, State]) -> dict[str, State]:
        """The states before a step that is being captured: where they lie now they stay."""
        return {
            label: self._held.setdefault(label, {key: state[key] for key in state})
            for label, state in states.items()
        }

    def updated(self, states: dict[str, State]) -> dict[str, State]:
        """The states after a step, those that graphs read where they read them."""
        for label, held in self._held.items():
            if label not in states or states[label] is held:
                continue
            # First all of them: a policy may give a tensor of the old state another name.
            new = {key: states[label][key].clone() for key in held}
            for key, tensor in held.items():
                tensor.copy_(new[key])
            states[label] = held
        return states

    def forget(self, label: str) -> None:
        """These are states of other tensors, or another policy's, from now on: graphs with them are of no use."""
        self._held.pop(label, None)
