"""From an exported folder to a model that draws and answers. Tested by `tests/parts/test_export.py`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megavlm.config import load_config
from megavlm.errors import ConfigError, MegavlmError
from megavlm.image_tokenizers.carried import at_folder
from megavlm.model.backbone import Backbone
from megavlm.parts.parts import Parts

RECIPE_FILE, TEXT_MODEL, LAYOUT_FILE = "recipe.yaml", "text.model", "vocabulary.json"
IMAGE_TOKENIZER = "image_tokenizer"
MODULES_FILE = "modules/modules.safetensors"
"""Not beside the stock model's weights: who loads those takes every file of that kind."""


def is_export(path: Path) -> bool:
    return (path / LAYOUT_FILE).is_file()


def load_exported(folder: Path, overrides: dict[str, Any], device: torch.device) -> tuple[Backbone, Parts]:
    """The backbone of an exported folder, in float32, and the parts of its recipe.

    Raises:
        MegavlmError: If the folder was written before exports carried all that is needed.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise MegavlmError(f"{folder} was exported without its recipe, by an older megavlm\n  do:    export the run again")
    text = {"vocabulary.text_model": str(folder / TEXT_MODEL)}
    config = load_config(str(folder / RECIPE_FILE), text | overrides)
    tokenizer = at_folder(config.vocabulary.image_tokenizer, folder / IMAGE_TOKENIZER)
    vocabulary = config.vocabulary.model_copy(update={"image_tokenizer": tokenizer})
    parts = Parts(config.model_copy(update={"vocabulary": vocabulary}), device)
    try:
        backbone = parts.make_backbone(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        modules = load_file(folder / MODULES_FILE) if (folder / MODULES_FILE).is_file() else {}
        missing, unexpected = backbone.load_state_dict(modules, strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise MegavlmError(f"{folder} is no complete export: {error}\n  do:    export the run again") from error
    if unexpected or (missing := [name for name in missing if not name.startswith("causal_lm.")]):
        raise ConfigError(
            f"{folder}: its weights do not fit its recipe: missing {missing}, unexpected {unexpected}\n"
            "  do:    leave `routing` as it is in the recipe, or export the run again"
        )
    return backbone, parts
