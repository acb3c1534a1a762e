"""Random numbers as pure functions of a key, so that nothing about them needs to be saved.

A stream is named by integers (seed, purpose, then whatever it depends on: lane, step, epoch, …). The same name
gives the same numbers on any rank, in any worker, before and after an interruption.

Tested by `tests/data/pack/test_lane.py`.
"""

import hashlib
import struct
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream is for: keeps streams apart whose other coordinates are equal."""

    SHARD_ORDER = 1
    MIXTURE = 2
    PACKING = 3
    SAMPLE = 4
    SELECTION = 5
    MODULES = 6
    DRAWING = 7
    FORMAT = 8
    SYNTHETIC = 9
    ANALYSIS = 10
    WRITING = 11


def stream(seed: int, purpose: Purpose, *coordinates: int) -> np.random.Generator:
    """The generator named by these integers (Philox, counter based: Salmon et al., SC 2011)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, int(purpose), *coordinates))))


def uniform(seed: int, purpose: Purpose, *coordinates: int) -> float:
    """One number in [0, 1), for every sample: setting up a stream takes ten times as long."""
    name = struct.pack(f"<{len(coordinates) + 2}q", seed, purpose, *coordinates)
    return int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "little") / 2**48


def integer_seed(seed: int, purpose: Purpose, *coordinates: int) -> int:
    """A 63-bit seed for generators of other libraries (torch) from the same naming scheme."""
    words = np.random.SeedSequence((seed, int(purpose), *coordinates)).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1
