"""The learning rate as a function of the step."""

import math


def learning_rate(step: int, num_steps: int, peak: float, warmup_steps: int, min_ratio: float) -> float:
    """Linear warm-up from 0 to ``peak``, then a cosine down to ``min_ratio * peak`` at the last step (Loshchilov & Hutter 2017).

    Args:
        step: 0 … num_steps-1.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
