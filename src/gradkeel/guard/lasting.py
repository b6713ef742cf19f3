"""Policies' states in a CUDA graph of the user's own, whose replays read and write them where they lie."""

from collections.abc import Mapping

from torch import Tensor

from gradkeel.norms import State, kept


class Lasting:
    """Memory that states stay in from the first captured step on, for a graph holds addresses and owns nothing.

    Nobody else hears of a replay: what it leaves in this memory is the state that the next step begins with.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    def begun(self, states: Mapping[str, State]) -> dict[str, State]:
        """The states before a step that is being captured: where they lie now they stay."""
        for label, state in states.items():
            if label not in self._held:
                self._held[label] = {
                    key: kept(state[key]) for key in state
                }  # for the graph may outlive the guard
        return {label: self._held[label] for label in states}

    def updated(self, states: dict[str, State]) -> dict[str, State]:
        """The states after a step, those that graphs read where they read them."""
        for label, held in list(self._held.items()):
            new = states.get(label, held)
            if new is held:
                continue
            if {key: new[key].shape for key in new} != {key: own.shape for key, own in held.items()}:
                self.forget(label)
                continue
            # First all of them: a policy may give a tensor of the old state another name.
            copies = {key: new[key].clone() for key in held}
            for key, tensor in held.items():
                tensor.copy_(copies[key])
            states[label] = held
        return states

    def forget(self, label: str) -> None:
        """From now on these states are of other tensors, or otherwise made: a graph with them goes on by itself."""
        self._held.pop(label, None)
