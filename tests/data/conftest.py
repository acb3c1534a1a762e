"""A corpus that is quick to read: small images as codes, short texts, in shards of uneven sizes."""

import io
import json
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import webdataset

from megavlm.config import load_config
from megavlm.data.pack.lane import Lane
from megavlm.parts.parts import Parts
from tests.conftest import TINY


def npy(codes) -> bytes:
    content = io.BytesIO()
    np.save(content, np.asarray(codes, np.int16))
    return content.getvalue()


def write_shard(path, samples) -> None:
    """``samples`` are (key, {extension: bytes | JSON document})."""
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, members in samples:
            encoded = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in members.items()}
            writer.write({"__key__": key, **encoded})


def pair(task: str, side: int, text: str = "two words") -> dict:
    """Members of a sample that reads or draws one image of ``side`` x ``side`` codes."""
    image = {"image": "img0", "loss": task == "generation"}
    words = {"text": text, "loss": task == "understanding"}
    segments = [image, words] if task == "understanding" else [words, image]
    return {"json": {"task": task, "segments": segments}, "img0.npy": npy(np.arange(side * side).reshape(side, side) % 17)}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Two sources of 5 and 70 shards, so that one is sliced and one is dealt whole over 64 lanes; sizes differ."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for task, num_shards, sizes in (("understanding", 5, (90, 140)), ("generation", 70, (1, 12))):
        for shard in range(num_shards):
            samples = [(f"{shard}-{i}", pair(task, int(rng.integers(1, 5)))) for i in range(int(rng.integers(*sizes)))]
            write_shard(folder / f"{task}-{shard:02d}.tar", samples)
    return folder


@pytest.fixture(scope="session")
def corpus_sources(corpus):
    return {
        "understanding": {"shards": f"{corpus}/understanding-{{00..04}}.tar"},
        "generation": {"shards": f"{corpus}/generation-{{00..69}}.tar", "weight": 1.5},
    }


def factory_of(digits_folder, sources, **settings) -> Callable[[int], Lane]:
    """A lane factory of the tiny recipe on other sources, with these settings of `data`."""
    data = {"pack_tokens": 80, "look_ahead_samples": 8, "num_lanes": 4} | settings
    places = {"run_dir": "unused", "vocabulary.text_model": str(digits_folder / "text.model"), "data.sources": sources}
    overrides = TINY | places | {f"data.{name}": value for name, value in data.items()}
    return Parts(load_config("digits", overrides)).with_mixture().make_lane


@pytest.fixture
def make_factory(digits_folder):
    """``make_factory(sources, **data settings)``, see `factory_of`."""
    return partial(factory_of, digits_folder)


def ids(pack) -> list[tuple]:
    return [tuple(place) for place in pack.coordinates]
