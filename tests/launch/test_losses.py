"""Which errors say that something is gone, so that the run is requeued with a limit, and which that the same would happen again."""

import pytest
import torch
from torch import distributed

from megavlm.launch.train import is_a_loss


def caused_by(cause: Exception) -> RuntimeError:
    try:
        raise RuntimeError("the step failed") from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited or there was a network error"),
        distributed.DistNetworkError("failed to recv, got 0 bytes"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA driver error: device unavailable"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:3245"),
        RuntimeError("NCCL communicator was aborted on rank 3. Original reason for failure was: watchdog"),
        caused_by(RuntimeError("CUDA error: unspecified launch failure")),
    ],
    ids=str,
)
def test_what_is_lost_may_come_back(error):
    assert is_a_loss(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("NCCL"),
        ZeroDivisionError(),
    ],
    ids=str,
)
def test_what_would_happen_again_does_not(error):
    assert not is_a_loss(error)
