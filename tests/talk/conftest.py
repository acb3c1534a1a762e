"""A run folder after one step, and the images that it is asked about."""

import pytest
from PIL import Image

from megavlm.benchmarks import digits
from megavlm.config import load_config
from megavlm.parts.export import export
from tests.conftest import TINY
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train


@pytest.fixture(scope="session")
def run(digits_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk") / "run"
    sources = {t: {"shards": f"{digits_folder}/{t}-train-{{00..07}}.tar"} for t in ("understanding", "generation")}
    places = {"run_dir": str(folder), "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    run_ranks(1, train, load_config("digits", places | TINY | {"checkpoint.every_steps": 1}), 1)
    return folder


@pytest.fixture(scope="session")
def exported(run):
    export(run, run.with_name("exported"))
    return run.with_name("exported")


@pytest.fixture
def images(tmp_path):
    """`0.png` to `2.png`, and `broken.png`, which is none."""
    for number, codes in enumerate(digits.load("test").codes[:3]):
        Image.fromarray(digits.TOKENIZER.decode(codes[None])[0]).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return tmp_path
