"""Real text that every Python carries, as numbers: the language reference behind ``help()``."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradkeel.compare.task import TaskError

# Printable ASCII and the newline; 0 stands for every other character, so that models have one shape on every Python.
_CHARACTERS = [*map(chr, range(32, 127)), "\n"]
VOCABULARY = len(_CHARACTERS) + 1


@dataclass(frozen=True)
class Text:
    """Token ids of the text: the first nine tenths to train on, the last to validate with.

    Attributes:
        train: [n] int64.
        validation: [m] int64.
    """

    train: Tensor
    validation: Tensor


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
