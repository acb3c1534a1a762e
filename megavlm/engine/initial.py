"""Weights to begin with: of another run, of one of its checkpoints, or of an exported folder."""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from megavlm.engine.checkpoint import load_weights
from megavlm.engine.manifest import complete_checkpoints, verify
from megavlm.errors import ConfigError

log = logging.getLogger(__name__)


def load_initial_weights(source: str, causal_lm: nn.Module) -> None:
    """Copy weights into a model; nothing else is taken over.

    Args:
        source: A run folder (its newest intact checkpoint), a checkpoint, or a folder that `megavlm export` wrote.
        causal_lm: Of the same architecture and vocabulary.

    Raises:
        ConfigError: If there are no weights, or they do not fit.
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        intact = (checkpoint for checkpoint in reversed(complete_checkpoints(path / "checkpoints")) if not verify(checkpoint))
        path = next(intact, path)
    if (path / "manifest.json").is_file():
        try:
            load_weights(path, nn.ModuleDict({"causal_lm": causal_lm}))
        except (ValueError, RuntimeError, KeyError, torch.distributed.checkpoint.CheckpointException) as error:
            raise ConfigError(_does_not_fit(path, str(error).splitlines()[-1])) from error
    elif (path / "config.json").is_file() and (shards := sorted(path.glob("*.safetensors"))):
        weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        try:
            missing, unexpected = causal_lm.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise ConfigError(_does_not_fit(path, str(error))) from error
        # of two tied weights one is in the file
        tied = set(causal_lm.state_dict()) - set(dict(causal_lm.named_parameters()))
        if unexpected or set(missing) - tied:
            raise ConfigError(_does_not_fit(path, f"missing {missing}, unexpected {unexpected}"))
    else:
        raise ConfigError(
            f"init_from: {source} holds no weights\n"
            "  do:    name a run folder with a checkpoint, a checkpoint, or a folder written by `megavlm export`"
        )
    log.info("beginning with the weights of %s", path)


def _does_not_fit(path: Path, detail: str) -> str:
    return (
        f"init_from: the weights of {path} do not fit this model: {detail}\n"
        "  do:    use the same model.architecture, text model and image tokenizer"
    )
