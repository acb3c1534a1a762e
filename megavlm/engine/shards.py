"""The files that hold a checkpoint's tensors: written by every rank on its own, read by any number of ranks.

    tensors/
        layout.json               how many ranks wrote, and how many elements every tensor has
        rank-00003.safetensors    that rank's part of every tensor, flat

Rank r of W holds the elements from r * ceil(n / W) on of a tensor of n, at most ceil(n / W) of them: ZeRO-3's own rule. So where a part is
follows from `layout.json`, which is as long for 1,024 ranks as for one: nobody plans, and nothing is gathered.

Tested by `tests/engine/test_shards.py`.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megavlm.system.files import read_json

LAYOUT = "layout.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""What safetensors calls the precisions of masters, moments and frozen parameters."""


def part_of(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last element, exclusive, of a rank's part of a tensor."""
    each = -(-numel // world_size)
    return min(rank * each, numel), min((rank + 1) * each, numel)


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_part(folder: Path, rank: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Write a rank's parts into its file, and wait until they are on the disk. Large blocks are hashed and written without Python's lock.

    Args:
        folder: ``tensors/``, which is there.
        rank: This process.
        tensors: Flat ones in host memory, by name.

    Returns:
        ``{name of the file: {"bytes", "sha256"}}``.
    """
    # the widest first, so that every tensor begins at a multiple of its elements
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    with (folder / file_of(rank)).open("wb") as file:
        for block in [struct.pack("<Q", len(text)), text, *(tensor.view(torch.uint8).numpy().data for _, tensor in ordered)]:
            digest.update(block)
            num_bytes += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {file_of(rank): {"bytes": num_bytes, "sha256": digest.hexdigest()}}


def layout(numel: Mapping[str, int], world_size: int) -> str:
    """What stands in `layout.json`.

    Args:
        numel: Elements of every whole tensor.
        world_size: How many ranks write.
    """
    return json.dumps({"world_size": world_size, "numel": dict(numel)})


class Shards:
    """The tensors in a folder, any part of any of them. Files stay open as long as this does.

    Args:
        folder: ``tensors/`` of a complete checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        found = read_json(folder / LAYOUT)
        self.world_size: int = found["world_size"]
        self.numel: dict[str, int] = found["numel"]
        self._files: dict[int, Any] = {}

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements ``begin`` to ``end``, exclusive, of a tensor."""
        pieces = []
        for rank in range(self.world_size):
            first, last = part_of(self.numel[name], rank, self.world_size)
            if max(first, begin) < min(last, end):
                pieces.append(self._file(rank).get_slice(name)[max(first, begin) - first : min(last, end) - first])
        return torch.cat(pieces) if pieces else torch.empty(0)

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / file_of(rank), framework="pt")
        return self._files[rank]
