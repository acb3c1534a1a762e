"""DeepSpeed's ZeRO-3 engine around the backbone, and what we mend in it. Tested by `tests/distributed/test_training.py`."""

from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field

from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.engine.guard import Guard, GuardedAdamW
from megavlm.engine.partition import shape_of
from megavlm.engine.protocol import Engine
from megavlm.engine.reductions import reduce_scatter_coalesced
from megavlm.engine.schedule import OptimizerConfig
from megavlm.model.backbone import Backbone
from megavlm.model.experts import expert_blocks
from megavlm.settings import Number, PathText, Positive, Seconds, Settings, Switch


class EngineConfig(Settings):
    """DeepSpeed and the processes."""

    deepspeed: PathText = "zero3"
    """Name of a JSON file in `ds_configs/`, or a path. Batch sizes, precision and clipping are set by the recipe. A size of ZeRO
    that is "auto" there is chosen from the model and the device's memory, and written into the log."""
    leaf_modules: Literal["auto"] | Switch = "auto"
    """ZeRO gathers and reduces a decoder layer as a whole, instead of each of its modules alone; the gradients are the same up to rounding.
    `auto` does so on CUDA."""
    timeout_s: Seconds = 2400
    """Until the first step is done, a collective that takes longer is an error instead of a hang. The watchdog speaks before:
    its budget is at most four fifths of this."""
    step_timeout_s: Seconds = 2400
    """The same after the first step. Drawings and reports between steps must fit in too."""
    deterministic: Switch = False
    """Take algorithms on CUDA that give the same bits every time, which costs speed; on a CPU they do anyway. See docs/faults.md."""
    gc_every_steps: Positive = 100
    """Steps between collections of Python's garbage, on all ranks at the same step and at no other time."""
    stop_margin_s: Annotated[Number, Field(ge=0, le=1e6)] = 20.0
    """A run saves and ends before the job's time limit. This margin is added to the time that earlier saves and steps took."""

    def has_leaf_modules(self, device_type: str) -> bool:
        """Whether decoder layers are ZeRO's leaf modules on such a device."""
        return device_type == "cuda" if self.leaf_modules == "auto" else self.leaf_modules


SUMS_OF_BFLOAT16: dict[str, Any] = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
"""How gradients in bfloat16 are summed over ranks and over the packs of a step, unless the DeepSpeed file says otherwise: sums in bfloat16
would lose what is small beside them."""


def document_of(engine: EngineConfig, optimizer: OptimizerConfig, *, bfloat16: bool, packs_per_rank: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the recipe's file, and what the recipe says elsewhere.

    Args:
        engine: The recipe's ``engine``.
        optimizer: The recipe's ``optimizer``.
        bfloat16: Precision of the forward and backward pass; float32 otherwise.
        packs_per_rank: Micro-batches of an optimizer step on each rank.
    """
    return (
        (SUMS_OF_BFLOAT16 if bfloat16 else {})
        | read_deepspeed_file(engine.deepspeed)
        | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": packs_per_rank,
            # written always: the default has changed between versions of DeepSpeed
            "gradient_clipping": optimizer.gradient_clipping,
            "bf16": {"enabled": bfloat16},
            # they wait for the device twice per micro-batch; the meters tell the throughput
            "timers": {"throughput": {"enabled": False}},
        }
    )


def start_engine(
    backbone: Backbone, guard: Guard, optimizer: OptimizerConfig, document: dict[str, Any], *, leaf_modules: bool = False
) -> Engine:
    """DeepSpeed's engine around the backbone, with AdamW in two groups: matrices with weight decay, the rest without.

    Args:
        backbone: The model, divided by `megavlm.engine.partition` or whole.
        guard: Judges every step.
        optimizer: The recipe's ``optimizer``.
        document: What `document_of` gave, with a number for every size.
        leaf_modules: ZeRO gathers and reduces decoder layers as a whole.
    """
    # here, because it takes seconds and only training needs it
    import deepspeed
    from deepspeed.runtime.zero import stage3
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from deepspeed.utils import set_z3_leaf_modules

    # torch's AdamW is in this list by its exact class; ours is tested with ZeRO here, which DeepSpeed would warn about at every start
    if GuardedAdamW not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(GuardedAdamW)
    named = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    groups = [
        {"name": "decay", "params": [p for _, p in named if len(shape_of(p)) >= 2], "weight_decay": optimizer.weight_decay},
        {"name": "no_decay", "params": [p for _, p in named if len(shape_of(p)) < 2], "weight_decay": 0.0},
    ]
    adamw = GuardedAdamW(groups, guard, lr=optimizer.learning_rate, betas=optimizer.betas, eps=optimizer.eps)
    # experts as a whole at least: all ranks gather the same, whichever of them a rank's tokens choose (P7)
    if leaves := list(backbone.causal_lm.model.layers if leaf_modules else expert_blocks(backbone)):
        set_z3_leaf_modules(backbone, list({type(leaf) for leaf in leaves}))
    # DeepSpeed reads the norm back to the host in every step, to skip it there; our guard skips on the device
    stage3.is_invalid_grad_norm = lambda _norm: False
    stage3.reduce_scatter_coalesced = reduce_scatter_coalesced
    started, *_ = deepspeed.initialize(model=backbone, optimizer=adamw, config=document)
    return cast(Engine, started)


def gradient_norm(engine: Engine) -> torch.Tensor:
    """The global gradient norm of the step being taken, before clipping, on the device; inf if a gradient is not finite.

    ``engine.get_global_grad_norm`` gives the same number, but only after the step, and as a Python float.
    """
    return engine.optimizer._global_grad_norm


def forget_gradients(engine: Engine) -> None:
    """Forget the gradients of the step that was just taken.

    DeepSpeed's stage 3 (0.16 to at least 0.19.8) leaves the last gradient of a parameter in its buffer and applies it
    again in steps where the parameter gets none, such as steps without the only task that uses it.
    """
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def begin_anew(engine: Engine) -> None:
    """The next backward pass is the first one of a step: it overwrites, and no gradient from before is left where it does not."""
    engine.optimizer.zero_grad()
    forget_gradients(engine)


def local_gradients(engine: Engine) -> list[torch.Tensor]:
    """Copies of this rank's partitions of the gradients so far, of each trained parameter, in float32."""
    from deepspeed.utils import safe_get_local_grad

    return [safe_get_local_grad(p).clone() for p in engine.module.parameters() if p.requires_grad]
