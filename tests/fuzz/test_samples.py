"""Hostile samples and shards through lint, a lane and every data tool; hostile servers: a message with its place, or the right result."""

import json
import random
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from megavlm.data.pack.overlong import encode_within
from megavlm.data.read.index import write_index
from megavlm.data.read.shards import read_shard
from megavlm.data.read.source import SourceConfig
from megavlm.data.tools.describe import preview, stats
from megavlm.data.tools.inspect import inspect
from megavlm.data.tools.lint import lint
from megavlm.data.tools.tokenize import encode_shard
from megavlm.errors import DataError
from megavlm.image_tokenizers.pixel import PixelTokenizer
from tests.data.conftest import factory_of
from tests.fuzz.harness import is_documented, try_cases
from tests.fuzz.hostile_data import write_hostile_shard

PRELOAD = ("megavlm.parts.parts", "tests.fuzz.test_samples")


def try_shard(seed: int, number: int, digits_folder: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return _try_shard(random.Random(f"{seed} {number}"), Path(folder), digits_folder)


def _try_shard(chance: random.Random, folder: Path, digits_folder: Path) -> str:
    path, format, wanted = write_hostile_shard(chance, folder)
    url, source = str(path), SourceConfig(shards="none", format=format)
    sources = {"s": {"shards": url, "format": format, "epochs": 1}}
    pixels = PixelTokenizer(17, 8, 8)
    good: list[int] = []
    lane = None
    with suppress(DataError):
        lane = factory_of(digits_folder, sources, num_lanes=1, pack_tokens=400, max_errors=10**6)(0)
    digits = {"s": {"shards": f"{digits_folder}/understanding-train-00.tar"}}
    encoder = (lane or factory_of(digits_folder, digits, num_lanes=1, pack_tokens=400, max_errors=0)(0)).encoder
    report = lint([url], source, lambda sample: good.append(_encoded(sample, encoder)))
    for problem in report.problems:
        assert is_documented(str(problem)) and problem.shard == url, problem
    keys = [key for key, _ in _all(url)]
    assert set(wanted) <= set(keys), f"{wanted} are lost, there are {keys}"
    if lane is None:
        assert not good or report.problems, "a source with good samples was refused"
    else:
        seen = sorted(place[3] for pack, _ in lane for place in pack.coordinates)
        assert seen == sorted(good), f"lint finds {sorted(good)}, the lane reads {seen}"
    is_whole = all(problem.key for problem in report.problems)
    try:
        assert write_index(path).samples == len(keys) and is_whole
    except DataError as error:
        assert not is_whole and error.shard == url
    if path.name.startswith("a.tar"):
        with suppress(DataError):
            encode_shard(url, folder / "codes.tar", pixels)
            assert [key for key, _ in _all(str(folder / "codes.tar"))] == keys
    if chance.random() < 0.1:
        json.dumps(stats([url], source, folder / "stats.png"))
        inspect([url], source, folder / "sheet.png")
        preview([url], source, folder / "preview.png")
    if not good:
        return "refused: all"
    return "refused: some" if report.problems else "read"


def _encoded(sample, encoder) -> int:
    encode_within(sample, encoder, 400, "error")
    return sample.coordinates.index


def _all(url: str):
    found = []
    with suppress(DataError):
        for sample in read_shard(url):
            found.append(sample)
    return found


def table_of(digits_folder, seed: int, number: int):
    cases = {f"seed {seed}, shard {i}": (seed, i, digits_folder) for i in range(number)}
    return try_cases(try_shard, cases, seconds=60, title=f"{number} shards of samples, seed {seed}", preload=PRELOAD)


def test_a_hundred_hostile_shards(digits_folder):
    table = table_of(digits_folder, 1, 100)
    print(table)
    table.check(show=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_hostile_shards(digits_folder):
    table = table_of(digits_folder, 2, 2000)
    print(table)
    table.check()
