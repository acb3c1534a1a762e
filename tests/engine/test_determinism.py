"""`engine.deterministic`: torch's switch and cuBLAS's, before the first step. That the bits are the same on CUDA only a GPU can show;
that no operation of the step lacks a deterministic form is in `tests/cuda_without_gpu/test_device.py`."""

import os

import pytest
import torch

from megavlm.errors import ConfigError
from megavlm.system.determinism import be_deterministic
from tests.distributed.ranks import run_ranks
from tests.distributed.work import train


def train_and_look(world, config):
    found = train(world, config, 2)
    switches = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return found, switches, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_a_run_has_the_switches_and_computes_the_same_bits_as_without_on_a_cpu(make_config, tmp_path):
    results = []
    for value in (False, True):
        config = make_config({"engine.deterministic": value}, tmp_path / str(value))
        ((found, switches, workspace),) = run_ranks(1, train_and_look, config)
        assert (switches, workspace) == ((value, False), ":4096:8" if value else None)
        results.append(found["weights"])
    assert all(tensor.equal(results[1][name]) for name, tensor in results[0].items())


def test_an_environment_that_asks_for_the_contrary_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:0:0"):
        be_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
