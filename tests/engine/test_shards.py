"""What some ranks wrote, any part of it, is read by any others; the plan of it is as long for 1,024 ranks as for one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megavlm.engine.shards import LAYOUT, Shards, file_of, layout, part_of, write_part
from megavlm.system.files import sha256

TENSORS = {
    "value/frozen": torch.arange(7).bfloat16(),
    "value/one": torch.tensor([5.0]),
    "value/matrix": torch.randn(1001, generator=torch.Generator().manual_seed(0)),
    "exp_avg/matrix": torch.randn(1001, generator=torch.Generator().manual_seed(1)),
}


@pytest.fixture(params=[1, 2, 3, 8])
def written(request, tmp_path):
    """A folder that so many ranks have written, and what each said of its file."""
    entries = {}
    for rank in range(request.param):
        parts = {name: tensor[slice(*part_of(len(tensor), rank, request.param))] for name, tensor in TENSORS.items()}
        entries |= write_part(tmp_path, rank, parts)
    (tmp_path / LAYOUT).write_text(layout({name: len(tensor) for name, tensor in TENSORS.items()}, request.param))
    return tmp_path, entries


@pytest.mark.parametrize("world_size", [1, 2, 5, 1500])
def test_another_number_of_ranks_reads_the_same(written, world_size):
    shards = Shards(written[0])
    assert list(shards.numel) == list(TENSORS)
    for name, tensor in TENSORS.items():
        parts = [shards.read(name, *part_of(len(tensor), rank, world_size)) for rank in range(world_size)]
        assert torch.cat([part.to(tensor.dtype) for part in parts]).equal(tensor), name


def test_a_rank_says_what_is_in_its_file(written):
    folder, entries = written
    for name, entry in entries.items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}


def test_the_files_are_safetensors(written):
    """Anybody can open them."""
    first = load_file(written[0] / file_of(0))
    assert set(first) == set(TENSORS)
    assert all(part.dtype == TENSORS[name].dtype for name, part in first.items())


def test_the_layout_does_not_grow_with_the_ranks():
    numel = {f"value/layer.{number}": 1 << 20 for number in range(900)}
    few, many = (json.loads(layout(numel, world_size)) for world_size in (1, 1024))
    assert few.pop("world_size") == 1 and many.pop("world_size") == 1024 and few == many
