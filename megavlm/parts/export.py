"""From a checkpoint to a folder that `transformers` loads, with all that drawing and answering needs (`megavlm.parts.exported` reads it).

config.json, generation_config.json, model*.safetensors     the stock model
tokenizer.json, tokenizer_config.json                       text, special tokens and image codes at their ids
vocabulary.json                                             where text, special tokens and image codes begin; the image tokenizer
image_tokenizer/                                            its weights, if it has any
recipe.yaml, text.model, modules/                           what only megavlm reads
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megavlm.config import RunConfig, save_config
from megavlm.engine.weights import load_weights
from megavlm.errors import MegavlmError
from megavlm.image_tokenizers.carried import at_folder, carry_image_tokenizer
from megavlm.parts.exported import IMAGE_TOKENIZER, LAYOUT_FILE, MODULES_FILE, RECIPE_FILE, TEXT_MODEL
from megavlm.parts.hub_tokenizer import write_tokenizer
from megavlm.parts.parts import Parts
from megavlm.parts.trained import load_run_config
from megavlm.runs.checkpoints import locate
from megavlm.system.files import folder_written_atomically
from megavlm.vocabulary import copy_text_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types of exported weights."""


def export(source: Path, out: Path, dtype: str = "float32") -> str:
    """Write weights, configuration, vocabulary and image tokenizer of a checkpoint.

    ``AutoModelForCausalLM.from_pretrained(out)`` gives the same logits, ``AutoTokenizer`` the same ids, or an error where the text model
    has no equal there; a tied output head is stored once. `megavlm.parts.exported.load_exported` makes the backbone of it again.

    Args:
        source: A run folder (its newest checkpoint) or a checkpoint in one.
        out: The folder to write.
        dtype: Type of the weights, of `DTYPES`.

    Returns:
        What was written, in words.

    Raises:
        MegavlmError: If ``out`` exists, or the checkpoint is damaged.
    """
    if out.exists():
        raise MegavlmError(f"{out} exists already\n  do:    name another folder, or remove it")
    if dtype not in DTYPES:
        raise MegavlmError(f"--dtype={dtype} is no type of exported weights\n  do:    give float32 or bfloat16")
    folder, checkpoint = locate(source)
    parts = Parts(load_run_config(folder))
    vocabulary, tokenizer_config = parts.vocabulary, parts.config.vocabulary.image_tokenizer
    if tokenizer_config.kind != "pixel" and tokenizer_config.fingerprint not in (None, parts.image_tokenizer.fingerprint):
        raise MegavlmError(f"{tokenizer_config.path} holds another image tokenizer than the run began with\n  do:    put that one back")
    backbone = parts.make_backbone()
    causal_lm = backbone.causal_lm
    load_weights(checkpoint, backbone)
    backbone.to(DTYPES[dtype])
    modules = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("causal_lm.")}
    inside = at_folder(tokenizer_config, Path(IMAGE_TOKENIZER))
    layout = {
        "size": vocabulary.size,
        "num_text": vocabulary.num_text,
        "specials": vocabulary.specials,
        "first_code": vocabulary.first_code,
        "image_tokenizer": inside.model_dump(mode="json"),
        "checkpoint": str(checkpoint.name),
    }
    with folder_written_atomically(out) as files:
        for described in (causal_lm.config, causal_lm.generation_config):
            described.bos_token_id, described.eos_token_id, described.pad_token_id = vocabulary.bos, vocabulary.eos, vocabulary.eos
        causal_lm.save_pretrained(files)
        copy_text_model(folder.text_model, files / TEXT_MODEL)
        (files / LAYOUT_FILE).write_text(json.dumps(layout, indent=1))
        carry_image_tokenizer(tokenizer_config, files / IMAGE_TOKENIZER)
        save_config(_recipe_of_export(parts.config, inside), files / RECIPE_FILE)
        if modules:
            (files / MODULES_FILE).parent.mkdir()
            save_file(modules, files / MODULES_FILE)
        without_tokenizer = write_tokenizer(vocabulary, files)
    remark = f"; stock models have no place for these, so they lie in {MODULES_FILE}: {', '.join(modules)}" if modules else ""
    size = sum(p.numel() for p in causal_lm.parameters()) / 1e6
    return f"{size:.2f}M parameters in {dtype} from {checkpoint}{remark}{without_tokenizer}"


def _recipe_of_export(config: RunConfig, inside) -> RunConfig:
    """The run's recipe with names inside the folder."""
    vocabulary = config.vocabulary.model_copy(update={"text_model": TEXT_MODEL, "image_tokenizer": inside})
    return config.model_copy(update={"run_dir": ".", "vocabulary": vocabulary})
