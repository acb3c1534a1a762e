"""The JSON file of `engine.deepspeed`: what may stand in it, and what the recipe says instead."""

import json
from typing import Any

from megavlm.engine.zero_sizes import ON_CPU
from megavlm.errors import ConfigError
from megavlm.system.files import find_resource

OF_THE_RECIPE = {
    "train_batch_size": "data.num_lanes",
    "train_micro_batch_size_per_gpu": "data.num_lanes",
    "gradient_accumulation_steps": "data.num_lanes",
    "gradient_clipping": "optimizer.gradient_clipping",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule and optimizer.warmup_steps",
    "activation_checkpointing": "model.activation_checkpointing",
    "tensorboard": "monitor",
    "timers": "monitor",
}
"""Key → the setting that says it."""
KNOWN = (
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "wall_clock_breakdown",
    "steps_per_print",
    "communication_data_type",
    "data_types",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "dump_state",
)
"""What else DeepSpeed may be told; it passes over all other keys without a word."""
SUMS = ("fp32", "bf16")
"""Precisions in which gradients may be summed."""
OFFLOAD = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """The document, complete but for what the recipe adds.

    Args:
        name: Name of a file in `ds_configs/`, or a path.

    Raises:
        ConfigError: With all that is wrong with it.
    """
    path = find_resource("ds_configs", name, ".json")
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"engine.deepspeed: {path} is not JSON: {error}\n  do:    start from a file in ds_configs/") from error
    mistakes = _mistakes(document)
    if mistakes:
        raise ConfigError("\n  ".join([f"engine.deepspeed: {path}:", *mistakes]) + "\n  do:    start from a file in ds_configs/")
    return document


def _mistakes(document: Any) -> list[str]:
    if not isinstance(document, dict) or not isinstance(document.get("zero_optimization"), dict):
        return ["there is no zero_optimization"]
    zero = document["zero_optimization"]
    mistakes = [f"{key}: is said by the recipe's {said}; leave it out" for key, said in OF_THE_RECIPE.items() if key in document]
    mistakes += [f"{key[:80]}: DeepSpeed would pass over it; leave it out" for key in document if key not in (*KNOWN, *OF_THE_RECIPE)]
    mistakes += [f"zero_optimization.{key}: offloading is not supported; leave it out" for key in OFFLOAD if zero.get(key)]
    mistakes += _mistakes_of_sums(document)
    if zero.get("stage") != 3 or isinstance(zero["stage"], bool):
        return [*mistakes, f"zero_optimization.stage: is {str(zero.get('stage'))[:80]}; megavlm trains with stage 3"]
    return [*mistakes, *_refused_by_deepspeed(document)]


def _mistakes_of_sums(document: dict[str, Any]) -> list[str]:
    """What is wrong with the precision of sums of gradients; DeepSpeed would pass over some of it, and fail late over the rest."""
    types = document.get("data_types", {})
    if not isinstance(types, dict) or set(types) - {"grad_accum_dtype"}:
        return ["data_types: may hold grad_accum_dtype alone"]
    named = {"data_types.grad_accum_dtype": types.get("grad_accum_dtype", "fp32")}
    named["communication_data_type"] = document.get("communication_data_type", "fp32")
    return [f"{key}: is {str(given)[:80]}; give one of {', '.join(SUMS)}" for key, given in named.items() if given not in SUMS]


def _refused_by_deepspeed(document: dict[str, Any]) -> list[str]:
    # here, because it takes seconds
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        # "auto" is filled in once the model is known
        zero: dict[str, Any] = document["zero_optimization"]
        given = {key: zero[key] for key in zero if key not in ON_CPU or zero[key] != "auto"}
        DeepSpeedZeroConfig(**given)
    except ValidationError as error:
        return [f"zero_optimization.{'.'.join(map(str, e['loc']))[:80]}: {e['msg']}" for e in error.errors()[:20]]
    return []
