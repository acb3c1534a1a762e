"""Tensors of checkpoints that were written before `megavlm.engine.shards`, by torch.distributed.checkpoint.

Tested by `tests/distributed/test_begun_before.py`.
"""

import warnings
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint import filesystem, state_dict_loader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

METADATA = ".metadata"


class OlderShards:
    """As `megavlm.engine.shards.Shards`; a tensor is read whole, whatever part of it is wanted.

    Args:
        folder: ``tensors/`` of a complete checkpoint.
    """

    def __init__(self, folder: Path):
        self._reader = _Reader(folder)
        known = self._reader.metadata.state_dict_metadata
        self.numel = {name: entry.size.numel() for name, entry in known.items() if isinstance(entry, TensorStorageMetadata)}

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Elements ``begin`` to ``end``, exclusive, of a tensor, float32."""
        flat = {name: torch.empty(self.numel[name], dtype=torch.float32)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it reads in one process
            state_dict_loader.load(flat, storage_reader=self._reader, no_dist=True)
        return flat[name][begin:end]


class _Reader(filesystem.FileSystemReader):
    """Reads the metadata once: they name every piece of every rank."""

    @cached_property
    def metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *_args, **_named) -> Metadata:
        return self.metadata
