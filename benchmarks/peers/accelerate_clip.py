"""Accelerate: ``accelerator.clip_grad_norm_``, which unscales where there is a scaler and then calls torch's."""

import torch

from gradkeel.bench import Contender, Gradients
from gradkeel.bench.contenders import NoStep, clip_function

NAME = "Accelerate clip_grad_norm_"
LIBRARY = "accelerate"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clip(gradients: Gradients, bound: float) -> Contender:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(NoStep(gradients.parameters))
    return clip_function(NAME, accelerator.clip_grad_norm_, gradients, bound)
