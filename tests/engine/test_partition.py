"""A model that is made divided has the weights that it has when it is made whole, and no process ever held it."""

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from megavlm.engine.partition import make_partitioned
from megavlm.engine.zero import document_of
from megavlm.parts.parts import Parts
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks

QWEN3 = TINY["model.architecture"]
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
CASES = {
    "untied": (QWEN3 | {"tie_word_embeddings": False}, False),
    "tied": (QWEN3 | {"tie_word_embeddings": True}, False),
    "bfloat16": (QWEN3, True),
    "biases": (LLAMA | {"attention_bias": True, "mlp_bias": True}, False),
    "one matrix for all three": (LLAMA | {"model_type": "phi3", "pad_token_id": 0}, False),
    "embedding with a row for padding": (LLAMA | {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1, "pad_token_id": 1}, True),
}


def compare(world, cases: dict) -> dict:
    """How each divided model differs from the whole one, and what was divided."""
    found = {}
    for name, (config, bfloat16) in cases.items():
        parts = Parts(config)
        torch.manual_seed(3)
        whole = parts.make_backbone()
        after = torch.get_rng_state()
        if bfloat16:
            whole = whole.bfloat16()
        torch.manual_seed(3)
        document = document_of(config.engine, config.optimizer, bfloat16=bfloat16, packs_per_rank=1)
        divided = make_partitioned(parts.make_backbone, document, bfloat16=bfloat16, device=world.device)
        parameters = dict(divided.named_parameters())
        problems = [] if torch.get_rng_state().equal(after) else ["other random numbers were drawn"]
        problems += [f"{n} is whole" for n, p in parameters.items() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        for other, parameter in whole.named_parameters():
            with deepspeed.zero.GatheredParameters([parameters[other]]):
                if not parameters[other].equal(parameter):
                    problems.append(f"{other} differs")
        if set(parameters) != set(dict(whole.named_parameters())):
            problems.append("other parameters")
        found[name] = problems
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_same_weights(make_config, world_size):
    routed = {"routing.generation": {"policy": "mixture_of_depths"}}
    cases = {}
    for name, (architecture, bfloat16) in CASES.items():
        cases[name] = make_config({"model.architecture": architecture} | (routed if name == "biases" else {})), bfloat16
    for problems in run_ranks(world_size, compare, cases):
        assert problems == {name: [] for name in CASES}
