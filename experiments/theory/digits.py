"""Real images for the experiments: the 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """The images and what they show.

    Attributes:
        images: [1797, 1, 8, 8] float32 from 0 to 1.
        labels: [1797] int64 from 0 to 9.
    """

    images: Tensor
    labels: Tensor


@lru_cache(maxsize=1)
def digits() -> Digits:
    """The digits, read once; needs scikit-learn."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    pixels = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return Digits(pixels, torch.as_tensor(labels, dtype=torch.int64))
