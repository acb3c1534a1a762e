"""Weights to begin with: of another run, of one of its checkpoints, of an exported folder, or of a pretrained Hugging Face model.

Tested by `tests/parts/test_export.py`.
"""

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from megavlm.engine.checkpoint import DoesNotFit, load_weights
from megavlm.errors import ConfigError
from megavlm.runs.manifest import complete_checkpoints, verify
from megavlm.vocabulary import Vocabulary, same_text_model

log = logging.getLogger(__name__)

NEW_ROW_NOISE = 0.1
"""Standard deviation of a new row about the mean of the old ones, as a share of theirs."""


def load_initial_weights(source: str, causal_lm: PreTrainedModel, vocabulary: Vocabulary) -> None:
    """Copy weights into a model, and nothing else.

    The embedding and head of a pretrained model grow by the special tokens and image codes, if the text tokenizer is its own.

    Args:
        source: A run folder (its newest intact checkpoint), a checkpoint, a folder that `megavlm export` wrote, or that of a
            pretrained model of `transformers`, as safetensors.
        causal_lm: Model of the same architecture.
        vocabulary: Vocabulary of the run.

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
        except DoesNotFit as error:
            raise ConfigError(_does_not_fit(path, error.detail)) from error
    elif (path / "config.json").is_file() and (shards := sorted(path.glob("*.safetensors"))):
        weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
        own_text = same_text_model(path, vocabulary.text_model)
        for name in _vocabulary_matrices(causal_lm) & set(weights):
            if own_text and len(weights[name]) == vocabulary.num_text:
                weights[name] = grown(weights[name], vocabulary.size)
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
            "  do:    name a run folder with a checkpoint, a checkpoint, a folder written by `megavlm export`, or the folder of a"
            " pretrained model with safetensors"
        )
    log.info("beginning with the weights of %s", path)


def grown(rows_VD: torch.Tensor, num_rows: int) -> torch.Tensor:
    """An embedding or head with new rows at its end: the mean of the old ones and a little noise.

    The mean keeps new tokens from being likelier than old ones by chance (Hewitt 2021, "Initializing new word embeddings for pretrained
    language models"); the noise tells codes from each other. The same on every rank: its generator has a seed of its own.
    """
    old_VD = rows_VD.float()
    noise = torch.randn(num_rows - len(old_VD), old_VD.shape[1], generator=torch.Generator().manual_seed(len(old_VD)))
    return torch.cat([old_VD, old_VD.mean(0) + NEW_ROW_NOISE * old_VD.std(0) * noise])


def _vocabulary_matrices(causal_lm: PreTrainedModel) -> set[str]:
    """Names of the embedding and the output head; a tied head may be in a file under its own name as well."""
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    assert head is not None  # a causal model has one
    matrices = {id(embedding.weight), id(head.weight)}
    return {name for name, tensor in causal_lm.named_parameters(remove_duplicate=False) if id(tensor) in matrices}


def _does_not_fit(path: Path, detail: str) -> str:
    return (
        f"init_from: the weights of {path} do not fit this model: {detail}\n"
        "  do:    use the same model.architecture, text model and image tokenizer; for a pretrained model give its folder as"
        " model.architecture and vocabulary.text_model"
    )
