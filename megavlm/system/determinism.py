"""The same bits in every run on the same machines: what `engine.deterministic` turns on. Tested by `tests/engine/test_determinism.py`."""

import os

import torch
from torch.utils import deterministic

from megavlm.errors import ConfigError

WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which matrix products do not depend on the moment."""


def be_deterministic() -> None:
    """Take a deterministic algorithm wherever torch has one: attention's backward pass, sums by index. Called before the first product.

    An operation that has none raises a RuntimeError when it is called; the step of a run calls none of these.

    Raises:
        ConfigError: If the environment asks cuBLAS for the contrary.
    """
    given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if given not in WORKSPACES:
        raise ConfigError(
            f"engine.deterministic: the environment has CUBLAS_WORKSPACE_CONFIG={given}\n"
            f"  do:    leave it out, or give {' or '.join(WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    # every value is written before it is read: nothing needs to be filled first
    deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue] (torch sets it on the module's class)
    torch.backends.cudnn.benchmark = False
