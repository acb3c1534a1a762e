"""A checkpoint's weights in one process, without DeepSpeed: a tensor at a time. Tested by `tests/parts/test_export.py`."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint import api, filesystem, state_dict_loader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megavlm.errors import MegavlmError
from megavlm.runs.manifest import verify
from megavlm.system.progress import progress

MODULES_OF = {
    "gates": "learned gates, which the policy mixture_of_depths needs",
    "injectors": "projections, which the policy kv_injection needs",
    "reader": "a layer that reads features, which this image tokenizer needs",
}
"""Parts of a backbone that come from its route or its image tokenizer, by the first part of their names."""


class DoesNotFit(MegavlmError):
    """An intact checkpoint that does not hold the tensors of this model.

    Args:
        path: The checkpoint.
        detail: What torch says; its first line counts.
    """

    def __init__(self, path: Path, detail: str):
        self.path = path
        self.detail = next(iter(detail.splitlines()), "")
        super().__init__(path, detail)

    def __str__(self) -> str:
        return (
            f"checkpoint {self.path} does not fit this model: {self.detail}\n"
            "  do:    give the model and the routing that it was trained with, or another run_dir"
        )


class CheckpointWeights:
    """The weights of a checkpoint, read one by one.

    Args:
        path: A complete checkpoint.

    Raises:
        MegavlmError: If it is damaged.
    """

    def __init__(self, path: Path):
        if problems := verify(path):
            raise MegavlmError(
                f"checkpoint {path} is damaged: {'; '.join(problems)}\n"
                "  do:    name another one in place of the run: RUN/checkpoints/step-…;"
                " `megavlm checkpoint verify RUN` says which are intact"
            )
        self.path = path
        self._reader = _Reader(path / "tensors")

    def check(self, parameters: dict[str, torch.Size]) -> None:
        """Whether all parameters of a model are there.

        Args:
            parameters: Their shapes.

        Raises:
            DoesNotFit: If one is not, or has another size.
        """
        check_modules(self.path, [f"value/{name}" for name in parameters])
        known = self._reader.metadata.state_dict_metadata
        for name, shape in parameters.items():
            there = known.get(f"value/{name}")
            if not isinstance(there, TensorStorageMetadata):
                raise DoesNotFit(self.path, f"it has no {name}")
            if there.size.numel() != shape.numel():
                raise DoesNotFit(self.path, f"{name} has {there.size.numel()} numbers, not {' x '.join(map(str, shape))}")

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One of them, float32."""
        flat = {f"value/{name}": torch.empty(shape.numel(), dtype=torch.float32)}
        try:
            state_dict_loader.load(flat, storage_reader=self._reader, no_dist=True)
        except (ValueError, RuntimeError, KeyError, api.CheckpointException) as error:
            raise DoesNotFit(self.path, in_short(error)) from error
        return flat[f"value/{name}"].view(shape)


class _Reader(filesystem.FileSystemReader):
    """Reads the metadata once: they name every piece of every rank."""

    @cached_property
    def metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *_args, **_named) -> Metadata:
        return self.metadata


def load_weights(path: Path, module: nn.Module) -> None:
    """Read a checkpoint's weights into a module in this one process. Takes the memory of the largest tensor beside the module.

    Args:
        path: A complete checkpoint.
        module: With the same parameters as the one that was trained.
    """
    weights = CheckpointWeights(path)
    parameters = dict(module.named_parameters())
    weights.check({name: parameter.shape for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in progress(parameters.items(), "read weights"):
            parameter.copy_(weights.read(name, parameter.shape))


def check_modules(path: Path, tensors: Iterable[str]) -> None:
    """Whether a checkpoint holds all modules of a model.

    Raises:
        DoesNotFit: Naming those that it lacks, and what needs them.
    """
    known = filesystem.FileSystemReader(path / "tensors").read_metadata().state_dict_metadata
    lacking = sorted({name.removeprefix("value/") for name in tensors if name.startswith("value/") and name not in known})
    for kind, words in MODULES_OF.items():
        if names := [name for name in lacking if name.startswith(f"{kind}.")]:
            raise DoesNotFit(path, f"it has no {words} ({', '.join(names)}); `init_from` in a new run takes over all the rest")


def in_short(error: BaseException) -> str:
    """The innermost cause: torch wraps what happened on the ranks into tracebacks."""
    if failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}"
