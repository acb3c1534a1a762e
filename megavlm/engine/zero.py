"""DeepSpeed's ZeRO-3 engine around the backbone, and what we mend in it."""

import json

import deepspeed
import torch
from deepspeed.runtime.zero import stage3
from deepspeed.utils import safe_get_local_grad

from megavlm.config import RunConfig, find_resource
from megavlm.engine.distributed import World
from megavlm.engine.guard import Guard, GuardedAdamW


def start_engine(backbone: torch.nn.Module, config: RunConfig, world: World, guard: Guard):
    """DeepSpeed's engine around the backbone, with AdamW in two groups, matrices with weight decay and the rest without."""
    settings = config.optimizer
    named = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for _, p in named if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"name": "no_decay", "params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = GuardedAdamW(groups, guard, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    document = json.loads(find_resource("ds_configs", config.engine.deepspeed, ".json").read_text())
    bfloat16 = config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and world.device.type == "cuda")
    document |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.num_lanes // world.size,
        # written always: the default has changed between versions of DeepSpeed
        "gradient_clipping": settings.gradient_clipping,
        "bf16": {"enabled": bfloat16},
    }
    # DeepSpeed reads the norm back to the host in every step, to skip it there; our guard skips on the device
    stage3.is_invalid_grad_norm = lambda _norm: False
    engine, *_ = deepspeed.initialize(model=backbone, optimizer=optimizer, config=document)
    return engine


def gradient_norm(engine) -> torch.Tensor:
    """The global gradient norm of the step being taken, before clipping, on the device; inf if a gradient is not finite.

    ``engine.get_global_grad_norm`` gives the same number, but only after the step, and as a Python float.
    """
    return engine.optimizer._global_grad_norm


def forget_gradients(engine) -> None:
    """Forget the gradients of the step that was just taken.

    DeepSpeed's stage 3 (0.16 to at least 0.19.8) leaves the last gradient of a parameter in its buffer and applies it
    again in steps where the parameter gets none, such as steps without the only task that uses it.
    """
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def begin_anew(engine) -> None:
    """The next backward pass is the first one of a step: it overwrites, and no gradient from before is left where it does not."""
    engine.optimizer.zero_grad()
    forget_gradients(engine)


def local_gradients(engine) -> list[torch.Tensor]:
    """Copies of this rank's partitions of the gradients so far, of each trained parameter, in float32."""
    return [safe_get_local_grad(p).clone() for p in engine.module.parameters() if p.requires_grad]
