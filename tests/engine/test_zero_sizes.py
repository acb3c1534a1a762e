"""The sizes of ZeRO that a file leaves open."""

import logging

import pytest
import torch

from megavlm.engine.deepspeed_file import read_deepspeed_file
from megavlm.engine.schedule import OptimizerConfig
from megavlm.engine.zero import EngineConfig, document_of
from megavlm.engine.zero_sizes import LARGEST_BUCKET, ON_CPU, fill_in, with_sizes
from megavlm.parts.parts import Parts

H200 = 141 * 2**30
LAYER = [50_000_000, 25_000_000, 4096]


def sizes(numels, memory_bytes):
    return fill_in(dict.fromkeys(ON_CPU, "auto"), numels, memory_bytes=memory_bytes, element_bytes=2)


def test_a_cpu_gets_the_numbers_that_the_file_had_before():
    zero = read_deepspeed_file("zero3")["zero_optimization"]
    assert {name for name in zero if zero[name] == "auto"} == set(ON_CPU)
    filled = fill_in(zero, LAYER, memory_bytes=None, element_bytes=4)
    assert filled == {"stage": 3, "overlap_comm": True, "contiguous_gradients": True} | ON_CPU


def test_a_model_that_fits_stays_whole_and_a_larger_one_does_not():
    for num_layers, stays_whole in ((1, True), (16, True), (200, False)):
        numels = num_layers * LAYER
        found = sizes(numels, H200)
        assert (found["stage3_param_persistence_threshold"] == max(numels)) is stays_whole
        assert found["stage3_max_live_parameters"] >= (sum(numels) if stays_whole else max(numels))
        for bucket in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
            assert max(numels) <= found[bucket] <= LARGEST_BUCKET
    assert sizes(16 * LAYER, 8 * 2**30)["stage3_param_persistence_threshold"] < max(LAYER)


def test_numbers_of_the_file_are_kept_and_what_was_chosen_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        filled = fill_in({"reduce_bucket_size": 7, "stage3_prefetch_bucket_size": "auto"}, LAYER, memory_bytes=H200, element_bytes=2)
    assert filled["reduce_bucket_size"] == 7 and isinstance(filled["stage3_prefetch_bucket_size"], int)
    assert list(filled) == ["reduce_bucket_size", "stage3_prefetch_bucket_size"]
    assert "75.0M parameters" in caplog.text and "stage3_prefetch_bucket_size" in caplog.text and "reduce_bucket_size" not in caplog.text


def test_the_sizes_of_a_model_are_known_before_it_has_weights(make_config):
    parts, made = Parts(make_config()), []

    def make():
        made.append(parts.make_backbone())
        return made[-1]

    optimizer = OptimizerConfig(num_steps=1, learning_rate=1.0)
    document = document_of(EngineConfig(deepspeed="zero3"), optimizer, bfloat16=False, packs_per_rank=1)
    found = with_sizes(document, make, torch.device("cpu"))
    assert found["zero_optimization"] == document["zero_optimization"] | ON_CPU
    assert all(parameter.is_meta for parameter in made[0].parameters())
    assert with_sizes(found, make, torch.device("cpu")) is found and len(made) == 1


@pytest.mark.parametrize("memory_bytes", [None, H200])
def test_nothing_is_left_open(memory_bytes):
    assert all(isinstance(size, int) for size in sizes(LAYER, memory_bytes).values())
