"""Packs on their way to the device: each is copied while the one before it is computed. Tested by `tests/data/pack/test_ahead.py`."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from megavlm.data.pack.pack import Pack


def copied_ahead(packs: Sequence[Pack], device: torch.device) -> Iterator[tuple[Pack, Pack]]:
    """Each pack, and its copy on the device.

    On CUDA the copies run on a stream of their own, from the page-locked memory that the loader filled.
    """
    if device.type != "cuda":
        yield from ((pack, pack.to(device)) for pack in packs)
        return
    copying = torch.cuda.Stream(device)

    def begin(pack: Pack) -> Pack:
        with torch.cuda.stream(copying):
            return pack.to(device)

    coming = begin(packs[0])
    for number, pack in enumerate(packs, start=1):
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        here = coming.map_tensors(partial(_kept_for, computing))
        if number < len(packs):
            coming = begin(packs[number])
        yield pack, here


def _kept_for(stream: torch.cuda.Stream, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose memory is given to no other before ``stream`` is through with it."""
    tensor.record_stream(stream)
    return tensor
