"""Our sum of gradients over the ranks beside DeepSpeed's: the same bits of the same parts."""

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives as deepspeeds
from deepspeed.runtime.zero import stage3

from megavlm.engine import reductions
from megavlm.launch.train import make_trainer
from tests.distributed.ranks import run_ranks

BUCKETS = {
    "one that is divided evenly": [(6, 4)],
    "one that is not": [(7, 5)],
    "several": [(6, 4), (1,), (2,), (7, 5), (3, 1), (12,)],
    "less than there are ranks": [(1,)],
}


def both(world, shapes: list) -> list[bool]:
    """Whether each part of each bucket is the same."""
    equal = []
    for shape in shapes:
        generator = torch.Generator().manual_seed(world.rank)
        gradients = [torch.randn(size, generator=generator) for size in shape]
        theirs = deepspeeds.reduce_scatter_coalesced([gradient.clone() for gradient in gradients])
        ours = reductions.reduce_scatter_coalesced([gradient.clone() for gradient in gradients])
        equal += [one.equal(other) and one.shape == other.shape for one, other in zip(theirs, ours, strict=True)]
    return equal


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_same_parts_as_deepspeed(world_size):
    for equal in run_ranks(world_size, both, list(BUCKETS.values())):
        assert len(equal) == sum(map(len, BUCKETS.values())) and all(equal)


def is_used(world, config) -> bool:
    make_trainer(config, world)
    return stage3.reduce_scatter_coalesced is reductions.reduce_scatter_coalesced


def test_training_uses_it(make_config):
    assert run_ranks(1, is_used, make_config()) == [True]
