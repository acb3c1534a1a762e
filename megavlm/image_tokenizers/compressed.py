"""The compressed image tokenizer: any image tokenizer with a UniCompress plug-in around it (`megavlm.image_tokenizers.compressor`).

An image's codes are one row: the indices of its global tokens, a separator, the indices of its compressed tokens. The sequence reads

    <boi> g0 … g3 <img_sep> c0 … c15 <eoi>

``<img_sep>`` is the last entry of the codebook. It gets an id of its own among the vocabulary's image codes and is treated
like them. `barred` makes the sampler draw it at its place and nowhere else.

A plug-in is a folder: ``plug_in.json`` (sizes), ``plug_in.safetensors``; `megavlm data compressor` writes it.

Letters: N images, h and w rows and columns of dense codes, P tokens of a compressed image, R places with features, F numbers of a feature.
"""

import hashlib
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file

from megavlm.errors import ConfigError, DataError
from megavlm.image_tokenizers.compressor import PlugInSettings
from megavlm.image_tokenizers.decompressor import PlugIn
from megavlm.image_tokenizers.fitting import Loss
from megavlm.image_tokenizers.pixel import PixelTokenizerConfig
from megavlm.image_tokenizers.protocol import Features, ImageTokenizer, codes_of_member
from megavlm.image_tokenizers.vq import VQTokenizerConfig
from megavlm.settings import PathText, Settings


class CompressedTokenizerConfig(Settings):
    """A UniCompress plug-in around another tokenizer (`megavlm.image_tokenizers.compressed`)."""

    kind: Literal["compressed"]
    """Which tokenizer."""
    path: PathText
    """Folder written by `megavlm data compressor`. It is not copied into the run folder."""
    around: Annotated[PixelTokenizerConfig | VQTokenizerConfig, Field(discriminator="kind")]
    """The tokenizer that the plug-in was trained around."""
    understanding: Literal["continuous", "discrete"] = "continuous"
    """What the model reads of an image: the tokens as features, projected by the `reader`; or their codes, as in drawing."""
    fingerprint: str | None = None
    """Fingerprint of the plug-in and the tokenizer inside. Filled in at the start of a run, which does not resume with others."""


SETTINGS_FILE, WEIGHTS_FILE = "plug_in.json", "plug_in.safetensors"
BATCH_IMAGES = 256


def save_plug_in(plug_in: PlugIn, folder: Path) -> None:
    """Write a plug-in into a folder."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in plug_in.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / SETTINGS_FILE).write_text(plug_in.settings.model_dump_json(indent=1))


def read_settings(folder: Path) -> PlugInSettings:
    """The sizes of a plug-in; reads no weights.

    Raises:
        ConfigError: If the folder holds none.
    """
    try:
        return PlugInSettings.model_validate_json((folder / SETTINGS_FILE).read_text())
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"vocabulary.image_tokenizer.path: {folder} holds no plug-in: {error}\n  do:    train one with `megavlm data compressor`"
        ) from error


class CompressedTokenizer(ImageTokenizer):
    """A tokenizer with fewer codes per image.

    Args:
        path: Folder of the plug-in.
        around: The tokenizer that it was trained around.
        device: Where the plug-in runs.
        expected: The fingerprint that it must have, if known; checked when the weights are read.
        reads_features: Images that are read give continuous features instead of codes.

    Raises:
        ConfigError: If the plug-in is missing, or belongs to a tokenizer of other sizes.
    """

    def __init__(
        self,
        path: str | Path,
        around: ImageTokenizer,
        device: str | torch.device = "cpu",
        expected: str | None = None,
        *,
        reads_features: bool = False,
    ):
        self.path = Path(path)
        self.around = around
        self.device = torch.device(device)
        self.expected = expected
        self.settings = settings = read_settings(self.path)
        wanted = (settings.num_dense_codes, settings.height, settings.width)
        given = (around.codebook_size, around.height, around.width)
        if wanted != given:
            raise ConfigError(
                f"vocabulary.image_tokenizer: the plug-in {self.path} is one for {wanted[0]} codes on {wanted[1]} x {wanted[2]}, the"
                f" tokenizer has {given[0]} on {given[1]} x {given[2]}\n"
                "  do:    give the tokenizer that it was trained around, or train another plug-in"
            )
        self.separator = settings.codebook_size
        self.codebook_size = settings.codebook_size + 1
        self.height = 1
        self.width = settings.num_tokens + 1
        self.has_decoder = around.has_decoder
        self.feature_width = settings.embedding_width if reads_features else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprint of the tokenizer inside and the plug-in's files; changes whenever a code could."""
        files = (self.path / SETTINGS_FILE, self.path / WEIGHTS_FILE)
        return hashlib.sha256(self.around.fingerprint.encode() + b"".join(file.read_bytes() for file in files)).hexdigest()

    @property
    def of_shards(self) -> ImageTokenizer:
        return self.around

    def barred(self) -> np.ndarray:
        """Which code may not stand at which place ``[width, codebook_size]``: the separator has its own."""
        is_separator_P = np.arange(self.width) == self.settings.num_global
        return is_separator_P[:, None] != (np.arange(self.codebook_size) == self.separator)

    def encode(self, images: Collection[np.ndarray]) -> np.ndarray:
        """uint8 RGB images ``[H, W, 3]`` to codes ``[N, 1, width]``."""
        return self.compress(self.around.encode(images))

    def encode_member(self, name: str, image: np.ndarray, has_loss: bool) -> tuple[np.ndarray, Features | None]:
        dense_hw = codes_of_member(self.around, name, image)
        if dense_hw.shape != (self.around.height, self.around.width):
            raise DataError(
                f"{name} has {dense_hw.shape[0]} x {dense_hw.shape[1]} codes, not {self.around.height} x {self.around.width}",
                "give raw images, or codes of the tokenizer inside the compressed one",
            )
        return self.compress(dense_hw[None])[0], self.features(dense_hw) if self.feature_width and not has_loss else None

    def loss_of(self, image: np.ndarray) -> Loss | None:
        return self.around.loss_of(image)

    def codebook(self) -> torch.Tensor | None:
        return None

    def to(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self.around.to(device)
        vars(self).pop("plug_in", None)

    def compress(self, dense_Nhw: np.ndarray) -> np.ndarray:
        """Dense codes to codes ``[N, 1, width]``."""
        indices_NP = np.concatenate([self.plug_in.compress(batch).cpu().numpy() for batch in self._batches(dense_Nhw)])
        return np.insert(indices_NP, self.settings.num_global, self.separator, axis=1)[:, None]

    def decode(self, codes_N1P: np.ndarray) -> np.ndarray:
        """Codes ``[N, 1, width]`` to uint8 RGB images ``[N, H, W, 3]``."""
        return self.around.decode(self.restore(codes_N1P))

    def restore(self, codes_N1P: np.ndarray) -> np.ndarray:
        """Codes to dense codes ``[N, h, w]``."""
        indices_NP = np.delete(np.asarray(codes_N1P)[:, 0], self.settings.num_global, axis=1)
        return np.concatenate([self.plug_in.restore(batch).cpu().numpy() for batch in self._batches(indices_NP)])

    @torch.no_grad()
    def features(self, dense_hw: np.ndarray) -> Features:
        """Features that understanding reads: the tokens before quantisation. The separator keeps its embedding."""
        values_PD = self.plug_in.compressor(torch.from_numpy(dense_hw)[None].to(self.device))[0]
        places_P = np.delete(np.arange(self.width), self.settings.num_global)
        return Features(places_P, values_PD.float().cpu().numpy())

    @cached_property
    def plug_in(self) -> PlugIn:
        """The plug-in, loaded when it is first needed."""
        if self.expected and self.expected != self.fingerprint:
            raise ConfigError(
                f"vocabulary.image_tokenizer.path: {self.path} is another plug-in than the run began with, or has another tokenizer"
                " inside\n  do:    put that one back, or begin another run"
            )
        plug_in = PlugIn(self.settings)
        try:
            plug_in.load_state_dict(load_file(self.path / WEIGHTS_FILE))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"vocabulary.image_tokenizer.path: the weights in {self.path} cannot be used: {error}\n  do:    train the plug-in again"
            ) from error
        return plug_in.to(self.device).eval().requires_grad_(False)

    def __getstate__(self):
        # weights do not travel to loader workers: each worker reads them again
        return {name: value for name, value in vars(self).items() if name not in ("plug_in", "fingerprint")}

    def _batches(self, array: np.ndarray):
        for begin in range(0, len(array), BATCH_IMAGES):
            yield torch.from_numpy(np.asarray(array[begin : begin + BATCH_IMAGES], np.int64)).to(self.device)
