"""How large a model is, and whether the numbers of its architecture can be those of one: known before anything is allocated."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN

from megavlm.errors import ConfigError

MOST = {"num_hidden_layers": 2000, "hidden_size": 2**20, "head_dim": 4096, "num_attention_heads": 2**16, "vocab_size": 2**24}
"""Upper bounds of single fields; `MOST_OTHERWISE` of the others."""
MOST_OTHERWISE = 2**31 - 1
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def check_numbers(architecture: dict[str, Any]) -> dict[str, Any]:
    """The architecture, if none of its numbers is one that no model has.

    Raises:
        ValueError: Naming all that are.
    """
    wrong = [problem for name, value in _leaves(architecture) if (problem := _problem(name, value))]
    if wrong:
        raise ValueError("; ".join(wrong))
    return architecture


def parameter_sizes(config: PreTrainedConfig) -> list[int]:
    """Numbers in each parameter of the model that a configuration describes, made without memory.

    Raises:
        ConfigError: If no model can be made of it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the code of the family raises
        raise ConfigError(
            f"model.architecture: transformers makes no model of it: {type(error).__name__}: {str(error)[:500]}\n"
            "  do:    correct its fields, or begin from the config.json of a published model"
        ) from error
    return [parameter.numel() for parameter in model.parameters()]


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for inner, value in tree.items():
            yield from _leaves(value, str(inner))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, name)
    else:
        yield name, tree


def _problem(name: str, value: Any) -> str:
    """What is wrong with a field; empty if nothing is known."""
    if name in ACTIVATIONS:
        is_known = isinstance(value, str) and value in ACT2FN
        return "" if is_known or value is None else f"{name} {value!r} is no activation of transformers; use one such as silu or gelu"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return f"{name} is {value}; give a finite number"
    if abs(value) > MOST.get(name, MOST_OTHERWISE):
        return f"{name} is {value}, more than {MOST.get(name, MOST_OTHERWISE)}; give a smaller number"
    if name.endswith(("_eps", "_epsilon")) and not 0 < value <= 1:
        return f"{name} is {value}; give a number above 0 and at most 1"
    if ("drop" in name or name.endswith("_pdrop")) and not 0 <= value < 1:
        return f"{name} is {value}; give a share below 1"
    if name == "initializer_range" and not 0 < value <= 10:
        return f"{name} is {value}; give a number above 0 and at most 10"
    if name == "head_dim" and (value <= 0 or value % 2):
        return f"{name} is {value}; give an even number: the rotary embedding turns pairs"
    if name in ("rope_theta", "factor", "max_position_embeddings", "sliding_window") and value <= 0:
        return f"{name} is {value}; give a number above 0"
    return ""
