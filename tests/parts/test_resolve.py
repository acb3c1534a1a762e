"""What is resolved is resolved once."""

import pytest

from megavlm.errors import MegavlmError
from megavlm.image_tokenizers.pixel import PixelTokenizer
from megavlm.launch.train import make_trainer
from tests.distributed.ranks import run_ranks


def count_image_tokenizers(world, config, num_steps: int) -> int:
    """How many image tokenizers a start and some steps make in this process."""
    made, make = [], PixelTokenizer.__init__

    def counting(self, *args):
        made.append(self)
        make(self, *args)

    PixelTokenizer.__init__ = counting
    trainer = make_trainer(config, world)
    for step in range(num_steps):
        trainer.train_step(step)
    return len(made)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_image_tokenizer_is_made_once_per_process(make_config, world_size):
    assert run_ranks(world_size, count_image_tokenizers, make_config(), 2) == [1] * world_size


def mistake_of(world, config) -> str:
    with pytest.raises(MegavlmError) as found:
        make_trainer(config, world)
    return str(found.value)


@pytest.mark.parametrize("what", ["the shards are missing", "the folder cannot be written"])
def test_a_mistake_that_rank_0_finds_ends_every_rank(make_config, tmp_path, what):
    if what == "the shards are missing":
        config = make_config({"data.sources": {"understanding": {"shards": str(tmp_path / "none.tar")}}})
    else:
        (tmp_path / "file").touch()
        config = make_config({"run_dir": str(tmp_path / "file" / "run")})
    first, second = run_ranks(2, mistake_of, config)
    assert first == second and "do:" in first
