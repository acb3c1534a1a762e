"""A run of two checkpoints to look into."""

import pytest

from megavlm.config import load_config
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train


@pytest.fixture(scope="session")
def trained(digits_folder, tmp_path_factory):
    """A run folder with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("analysed") / "run"
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    places = {"run_dir": str(run), "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    run_ranks(1, train, load_config("digits", TINY | places | {"checkpoint.every_steps": 2}), 4)
    return run


@pytest.fixture(scope="session")
def held_out(digits_folder):
    """Shards of both tasks that the run has not seen."""
    return f"{digits_folder}/{{understanding,generation}}-test-00.tar"
