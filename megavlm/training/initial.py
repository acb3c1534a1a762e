"""Weights to begin with: of another run, of one of its checkpoints, of an exported folder, or of a pretrained Hugging Face model.

Tested by `tests/parts/test_export.py`.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from megavlm.engine.partition import shape_of, write_whole
from megavlm.engine.weights import CheckpointWeights, DoesNotFit
from megavlm.errors import ConfigError
from megavlm.runs.manifest import complete_checkpoints, verify
from megavlm.system.memory import freed_memory_given_back
from megavlm.system.world import World
from megavlm.training.stacked_experts import Stored, with_stacked_experts
from megavlm.vocabulary import Vocabulary, same_text_model

log = logging.getLogger(__name__)

LANGUAGE_PARTS = ("language_model", "text_model")
"""Where multimodal models of `transformers` have their text decoder."""
NEW_ROW_NOISE = 0.1
"""Standard deviation of a new row about the mean of the old ones, as a share of theirs."""


def load_initial_weights(source: str, causal_lm: PreTrainedModel, vocabulary: Vocabulary, world: World | None = None) -> None:
    """Copy weights into a model, and nothing else, a tensor at a time.

    The embedding and head of a pretrained model grow by the special tokens and image codes, if the text tokenizer is its own.

    Args:
        source: A run folder (its newest intact checkpoint), a checkpoint, a folder that `megavlm export` wrote, or that of a
            pretrained model of `transformers`, as safetensors.
        causal_lm: Model of the same architecture; its parameters may be divided over the processes.
        vocabulary: Vocabulary of the run.
        world: The processes, if there are several: they call this together, and rank 0 alone reads.

    Raises:
        ConfigError: If there are no weights, or they do not fit.
    """
    readers: list[dict[str, Callable[[], torch.Tensor]]] = []

    def find() -> None:
        try:
            readers.append(_readers(Path(source), causal_lm, vocabulary))
        except OSError as error:
            raise ConfigError(
                f"init_from: {error.filename or source} cannot be read: {error.strerror}\n  do:    check the path and its permissions"
            ) from error

    if world:
        world.on_main(find)
    else:
        find()
    with freed_memory_given_back():
        for name, tensor in _tensors(causal_lm).items():
            write_whole(tensor, readers[0].get(name) if readers else None)


def _readers(path: Path, causal_lm: PreTrainedModel, vocabulary: Vocabulary) -> dict[str, Callable[[], torch.Tensor]]:
    """For each tensor of a model what reads it, once it is known that they all fit."""
    shapes = {name: shape_of(tensor) for name, tensor in _tensors(causal_lm).items()}
    given = path
    if (path / "checkpoints").is_dir():
        intact = (checkpoint for checkpoint in reversed(complete_checkpoints(path / "checkpoints")) if not verify(checkpoint))
        path = next(intact, path)
    if (path / "manifest.json").is_file():
        log.info("beginning with the weights of %s", path)
        return _of_checkpoint(path, {name: shapes[name] for name, _ in causal_lm.named_parameters()})
    if (path / "config.json").is_file() and (shards := sorted(path.glob("*.safetensors"))):
        log.info("beginning with the weights of %s", path)
        num_old = vocabulary.num_text if same_text_model(path, vocabulary.text_model) else None
        matrices = _vocabulary_matrices(causal_lm)
        return _of_safetensors(path, shards, shapes, names=_names(causal_lm), vocabulary_matrices=matrices, num_old=num_old)
    raise ConfigError(
        f"init_from: {given} holds no weights\n"
        "  do:    name a run folder with a checkpoint, a checkpoint, a folder written by `megavlm export`, or the folder of a"
        " pretrained model with safetensors"
    )


def _of_checkpoint(path: Path, shapes: dict[str, torch.Size]) -> dict[str, Callable[[], torch.Tensor]]:
    weights = CheckpointWeights(path)
    try:
        weights.check({f"causal_lm.{name}": shape for name, shape in shapes.items()})
    except DoesNotFit as error:
        raise ConfigError(_does_not_fit(path, error.detail)) from error
    return {name: partial(weights.read, f"causal_lm.{name}", shape) for name, shape in shapes.items()}


def _of_safetensors(
    path: Path,
    shards: list[Path],
    shapes: dict[str, torch.Size],
    *,
    names: dict[str, list[str]],
    vocabulary_matrices: set[str],
    num_old: int | None,
) -> dict[str, Callable[[], torch.Tensor]]:
    """What reads each tensor from a folder of `transformers`.

    Args:
        path: The folder.
        shards: Its files.
        shapes: Of the model's tensors.
        names: All names of each tensor: of two tied weights one may be in the files.
        vocabulary_matrices: Tensors that may have grown.
        num_old: The rows that these have in the files then.
    """
    try:
        there = {name: (shard, shape) for shard in shards for name, shape in _shapes_in(shard).items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(_does_not_fit(path, f"a file is damaged: {error}")) from error
    holder = with_stacked_experts({name: Stored(shape, partial(_read, shard, name)) for name, (shard, shape) in there.items()})
    called = language_part(path, list(holder))
    found = {name: next((called[other] for other in names[name] if other in called), None) for name in shapes}
    missing = sorted(name for name, other in found.items() if other is None)
    unexpected = sorted(set(called) - {other for others in names.values() for other in others})
    if missing or unexpected:
        raise ConfigError(_does_not_fit(path, f"missing {missing}, unexpected {unexpected}"))
    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for name, other in found.items():
        assert other is not None
        (shape, read), wanted = holder[other], shapes[name]
        if shape != wanted and name in vocabulary_matrices and shape == (num_old, *wanted[1:]):
            read = partial(_read_grown, read, wanted[0])
        elif shape != wanted:
            raise ConfigError(_does_not_fit(path, f"{name} is {_by(shape)} there and {_by(wanted)} here"))
        readers[name] = read
    return readers


def _shapes_in(shard: Path) -> dict[str, torch.Size]:
    with safe_open(shard, framework="pt") as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)


def _read(shard: Path, name: str) -> torch.Tensor:
    """One tensor; the file is closed again, or what has been read of it would stay in memory."""
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor(name)


def language_part(path: Path, names: list[str]) -> dict[str, str]:
    """What the tensors of a folder are called in a text decoder alone, and what there; all of them, if the model is one.

    A multimodal model of `transformers` holds its decoder below one name of `LANGUAGE_PARTS`. Its other parts, such as a vision encoder,
    are left out, and named in the log.
    """
    called = {}
    for name in names:
        for part in LANGUAGE_PARTS:
            inner = name.replace(f"model.{part}.", "model.", 1) if name.startswith(f"model.{part}.") else name.removeprefix(f"{part}.")
            if inner != name:
                called[inner] = name
    if not called:
        return {name: name for name in names}
    head = {name: name for name in names if name.startswith("lm_head.")}
    left_out = sorted({".".join(name.split(".")[:2]) for name in set(names) - {*called.values(), *head}})
    log.info("of %s the language part is taken; left out: %s", path, ", ".join(left_out) or "nothing")
    return called | head


def _read_grown(read: Callable[[], torch.Tensor], num_rows: int) -> torch.Tensor:
    return grown(read(), num_rows)


def _by(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _tensors(causal_lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a model's weights consist of: parameters, tied ones once, and buffers that are saved."""
    saved = set(causal_lm.state_dict())
    buffers = {name: buffer for name, buffer in causal_lm.named_buffers() if name in saved}
    return {**dict(causal_lm.named_parameters()), **buffers}


def _names(causal_lm: PreTrainedModel) -> dict[str, list[str]]:
    """All names of each of them."""
    names: dict[str, list[str]] = {name: [] for name in _tensors(causal_lm)}
    first = {id(tensor): name for name, tensor in _tensors(causal_lm).items()}
    for name, tensor in [*causal_lm.named_parameters(remove_duplicate=False), *causal_lm.named_buffers(remove_duplicate=False)]:
        if id(tensor) in first:
            names[first[id(tensor)]].append(name)
    return names


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
