"""A checkpoint's weights in one process, without DeepSpeed: a tensor at a time. Tested by `tests/parts/test_export.py`."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from megavlm.engine.older import METADATA, OlderShards
from megavlm.engine.shards import Shards
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
        self._shards = shards_of(path)

    def check(self, parameters: dict[str, torch.Size]) -> None:
        """Whether all parameters of a model are there.

        Args:
            parameters: Their shapes.

        Raises:
            DoesNotFit: If one is not, or has another size.
        """
        check_tensors(self.path, self._shards, {f"value/{name}": shape.numel() for name, shape in parameters.items()})

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One of them, float32."""
        return self._shards.read(f"value/{name}", 0, shape.numel()).float().view(shape)


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


def shards_of(path: Path) -> Shards | OlderShards:
    """The tensors of a complete checkpoint."""
    folder = path / "tensors"
    return OlderShards(folder) if (folder / METADATA).exists() else Shards(folder)


def check_tensors(path: Path, shards: Shards | OlderShards, wanted: Mapping[str, int]) -> None:
    """Whether a checkpoint holds all tensors of a model.

    Args:
        path: The checkpoint.
        shards: Its tensors.
        wanted: Their numbers of elements.

    Raises:
        DoesNotFit: Naming a tensor that it lacks, or the modules and what needs them; or one that has another size.
    """
    lacking = sorted({name.partition("/")[2] for name in wanted if name not in shards.numel})
    for kind, words in MODULES_OF.items():
        if names := [name for name in lacking if name.startswith(f"{kind}.")]:
            raise DoesNotFit(path, f"it has no {words} ({', '.join(names)}); `init_from` in a new run takes over all the rest")
    if lacking:
        raise DoesNotFit(path, f"it has no {lacking[0]}")
    for name, numel in wanted.items():
        if shards.numel[name] != numel:
            raise DoesNotFit(path, f"{name} has {shards.numel[name]} numbers, not {numel}")
