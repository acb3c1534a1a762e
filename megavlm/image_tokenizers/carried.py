"""An image tokenizer as a folder beside an exported model: nothing but what it needs, in the layout that it was read in.

pixel        no folder: its settings say all
vq           config.json and model.safetensors of the VQ model alone, as `transformers` loads it; preprocessor_config.json
compressed   the plug-in's files, and the tokenizer inside it in `around/`
"""

from pathlib import Path

from safetensors.torch import save_file

from megavlm.image_tokenizers.build import ImageTokenizerConfig
from megavlm.image_tokenizers.compressed import SETTINGS_FILE, WEIGHTS_FILE
from megavlm.image_tokenizers.vq import FAMILIES, read_vq_config, read_vq_weights
from megavlm.system.files import copy_atomically

AROUND = "around"
"""Folder of the tokenizer inside a compressed one."""
PREPROCESSOR_FILE = "preprocessor_config.json"


def carry_image_tokenizer(config: ImageTokenizerConfig, folder: Path) -> None:
    """Copy what the tokenizer needs into a new folder, which is not made for one that needs nothing."""
    if config.kind == "pixel":
        return
    folder.mkdir()
    source = Path(config.path)
    if config.kind == "vq":
        family, described = read_vq_config(source)
        described.architectures = [FAMILIES[family][0]]
        described.save_pretrained(folder)
        weights = {name: tensor.contiguous() for name, tensor in read_vq_weights(source).items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        if (source / PREPROCESSOR_FILE).is_file():
            copy_atomically(source / PREPROCESSOR_FILE, folder / PREPROCESSOR_FILE)
        return
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        copy_atomically(source / name, folder / name)
    carry_image_tokenizer(config.around, folder / AROUND)


def at_folder(config: ImageTokenizerConfig, folder: Path) -> ImageTokenizerConfig:
    """The settings of the tokenizer that was carried into a folder."""
    if config.kind == "pixel":
        return config
    moved = {"path": str(folder)}
    return config.model_copy(update=moved | ({"around": at_folder(config.around, folder / AROUND)} if config.kind == "compressed" else {}))
