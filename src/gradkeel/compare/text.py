"""Real text that every Python carries, the language reference behind ``help()``, and what tasks on it share."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkeel.compare.task import Task, TaskError

# Printable ASCII and the newline; 0 stands for every other character, so that models have one shape on every Python.
_CHARACTERS = [*map(chr, range(32, 127)), "\n"]
VOCABULARY = len(_CHARACTERS) + 1
IGNORED = -100  # cross_entropy's index for positions behind a sequence's end


class Text(NamedTuple):
    """Token ids of the text: the first nine tenths to train on, the last to validate with."""

    train: Tensor  # [n] int64
    validation: Tensor  # [m] int64


@lru_cache(maxsize=1)
def text() -> Text:
    """The topics of Python's own documentation, in alphabetical order, one token a character."""
    try:
        from pydoc_data import topics
    except ImportError:
        raise TaskError(
            "this Python comes without pydoc_data, the text that the task reads; use a full build of Python "
            "(on Debian, install python3 rather than python3-minimal)"
        ) from None
    index = {character: i for i, character in enumerate(_CHARACTERS, start=1)}
    whole = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = torch.tensor([index.get(character, 0) for character in whole])
    split = len(tokens) * 9 // 10
    return Text(tokens[:split], tokens[split:])


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """[len(starts), length + 1] consecutive tokens from each start: inputs, and targets one further."""
    return tokens[starts[:, None] + torch.arange(length + 1)]


class TextTask(Task):
    """Predict the next character, in batches [b, length + 1] of windows."""

    validated: int  # characters in a window to validate with

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """[] cross-entropy in nats a character, over all characters of the batch alike."""
        # What stands behind an end is seen by no position before it.
        logits = model(batch[:, :-1].clamp(min=0))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=IGNORED)

    def weight(self, batch: Tensor) -> float:
        """Characters predicted."""
        return float((batch[:, 1:] != IGNORED).sum())

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        """Cross-entropy on 64 windows, evenly spaced in the validation text."""
        tokens = text().validation
        starts = torch.linspace(0, len(tokens) - self.validated - 1, 64).long()
        return float(self.loss(model, windows(tokens, starts, self.validated)))
