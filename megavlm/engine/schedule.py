"""The learning rate as a function of the step. Tested by `tests/distributed/test_training.py`."""

import math
from typing import Annotated

from pydantic import Field

from megavlm.settings import Count, Number, Positive, Settings, Share

Decay = Annotated[Number, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay."""

    num_steps: Positive
    """Optimizer steps of the run."""
    learning_rate: Annotated[Number, Field(gt=0, le=10)]
    """Peak learning rate."""
    warmup_steps: Count = 0
    """Steps of linear warm-up."""
    min_lr_ratio: Share = 0.1
    """Learning rate at the last step, relative to the peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[Number, Field(ge=1e-15, le=1)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[Number, Field(ge=0, le=10)] = 0.1
    """For matrices; norms and biases have none."""
    gradient_clipping: Annotated[Number, Field(ge=0, le=1e6)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear warm-up from 0 to the peak, then a cosine down to ``min_lr_ratio`` of it at the last step (Loshchilov & Hutter 2017).

    Args:
        step: 0 … num_steps-1.
    """
    peak, warmup_steps, lowest = config.learning_rate, config.warmup_steps, config.min_lr_ratio
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, config.num_steps - 1 - warmup_steps)
    return peak * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))
