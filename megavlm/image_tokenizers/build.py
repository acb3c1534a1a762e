"""Builds the image tokenizer from its settings. Tested by `tests/image_tokenizers/test_vq.py`."""

from typing import Annotated

import torch
from pydantic import Field

from megavlm.image_tokenizers.compressed import CompressedTokenizer, CompressedTokenizerConfig
from megavlm.image_tokenizers.pixel import PixelTokenizer, PixelTokenizerConfig
from megavlm.image_tokenizers.protocol import ImageTokenizer
from megavlm.image_tokenizers.vq import VQTokenizer, VQTokenizerConfig

ImageTokenizerConfig = Annotated[PixelTokenizerConfig | VQTokenizerConfig | CompressedTokenizerConfig, Field(discriminator="kind")]


def build_image_tokenizer(
    config: PixelTokenizerConfig | VQTokenizerConfig | CompressedTokenizerConfig, device: str | torch.device = "cpu"
) -> ImageTokenizer:
    """Build the image tokenizer of a recipe. Its weights, if it has any, are read when they are first needed."""
    if config.kind == "pixel":
        return PixelTokenizer(config.levels, config.height, config.width, config.fit)
    if config.kind == "vq":
        return VQTokenizer(config.path, config.height, config.width, device, expected=config.fingerprint, fit=config.fit)
    around = build_image_tokenizer(config.around, device)
    return CompressedTokenizer(config.path, around, device, config.fingerprint, reads_features=config.understanding == "continuous")
