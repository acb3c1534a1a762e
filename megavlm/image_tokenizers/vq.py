"""Image tokenizers of pretrained models, from a local folder: the VQ parts of Chameleon, Emu3 and Janus as in `transformers`.

    folder of the VQ model         config.json with its model_type ("janus_vqgan"), safetensors
    folder of the whole model      config.json with "vq_config"; only the tensors below "vqmodel." are read

Sizes come from ``config.json``; weights are read when the first image is encoded or decoded. What differs between the families:

    Chameleon   arXiv 2405.09818: nearest code (Euclidean); `transformers` has no decoder for it, so it only encodes
    Emu3        arXiv 2409.18869: a video tokenizer; an image is four equal frames
    Janus       arXiv 2410.13848: the tokenizer of LlamaGen (arXiv 2406.06525), whose codes are directions: latent and codes are scaled to
                length 1 before they are compared (arXiv 2110.04627). `transformers` does so when it decodes, not in its ``encode``

Pixels are scaled to [-1, 1]; Emu3's folder may say otherwise in ``preprocessor_config.json``. A Janus model with ``3 p²`` input channels
takes patches of p x p pixels as channels (`megavlm.image_tokenizers.vq_training` makes such).
"""

import hashlib
import json
import math
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from torch.nn import functional

from megavlm.errors import ConfigError
from megavlm.image_tokenizers.fitting import Fit, fitted
from megavlm.image_tokenizers.protocol import DenseCodes, Side
from megavlm.settings import PathText, Settings


class VQTokenizerConfig(Settings):
    """The VQ model of Chameleon, Emu3 or Janus, or one trained by `megavlm data image-tokenizer` (`megavlm.image_tokenizers.vq`)."""

    kind: Literal["vq"]
    """Which tokenizer."""
    path: PathText
    """Folder written by `save_pretrained`, of the VQ model or of the whole model around it. It is not copied into the run folder."""
    height: Side
    """Rows of codes per image."""
    width: Side
    """Columns of codes per image."""
    fit: Fit = "crop"
    """What happens to images of other proportions: crop, pad or squash (`megavlm.image_tokenizers.fitting`)."""
    fingerprint: str | None = None
    """SHA-256 of the VQ model. Filled in at the start of a run, which does not resume with another one."""


BATCH_PIXELS = 1 << 21
"""Most pixels that go through the model at once (bounds its memory)."""
STRUCTURE = ("resolution", "attn_type", "attn_resolutions", "temporal_downsample_factor", "num_attention_heads")
FAMILIES = {
    "chameleon": ("ChameleonVQVAE", Image.Resampling.LANCZOS),
    "emu3": ("Emu3VQVAE", Image.Resampling.BICUBIC),
    "janus": ("JanusVQVAE", Image.Resampling.BICUBIC),
}
"""Family → class of `transformers`, and the filter that scales its images."""


class VQTokenizer(DenseCodes):
    """Images of one size to codes and back. Encodes in float32, so that codes do not depend on rounding; decodes in bfloat16 on CUDA.

    Args:
        path: Folder of a VQ model, or of the whole model around it.
        height: Rows of codes.
        width: Columns of codes.
        device: Where the model runs.
        expected: The fingerprint that the folder must have, if known; checked when the weights are read.
        fit: What happens to images of other proportions.

    Raises:
        ConfigError: If the folder is missing, or holds no VQ model.
    """

    def __init__(
        self,
        path: str | Path,
        height: int,
        width: int,
        device: str | torch.device = "cpu",
        *,
        expected: str | None = None,
        fit: Fit = "crop",
    ):
        self.path = Path(path)
        self.height = height
        self.width = width
        self.device = torch.device(device)
        self.expected = expected
        self.fit_kind: Fit = fit
        self.family, self.config = read_vq_config(self.path)
        self.codebook_size = self.config.codebook_size if self.family == "emu3" else self.config.num_embeddings
        self.patch = math.isqrt(self.config.in_channels // 3)
        self.factor = self.patch * 2 ** (len(self.config.channel_multiplier) - 1)
        self.has_decoder = self.family != "chameleon"

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return self.height * self.factor, self.width * self.factor

    def encode(self, images: Collection[np.ndarray]) -> np.ndarray:
        """uint8 RGB images ``[H, W, 3]`` of any sizes to codes ``[N, height, width]``."""
        prepared_NHWC = np.stack([self.fit(image) for image in images])
        return np.concatenate([self._encode(batch).cpu().numpy() for batch in self._batches(prepared_NHWC)])

    def decode(self, codes_Nhw: np.ndarray) -> np.ndarray:
        """Codes ``[N, height, width]`` to uint8 RGB images ``[N, H, W, 3]``.

        Raises:
            ConfigError: For Chameleon.
        """
        if not self.has_decoder:
            raise ConfigError(
                f"vocabulary.image_tokenizer: {self.path} is Chameleon's VQ model, which cannot decode images in transformers\n"
                "  do:    draw with the VQ model of Janus or Emu3, or set monitor.sample_every_steps to null"
            )
        codes = np.asarray(codes_Nhw, np.int64)
        return np.concatenate([self._decode(torch.from_numpy(batch)) for batch in self._batches(codes)])

    def codebook(self) -> torch.Tensor:
        """The embedding of every code as the decoder gets it ``[codebook_size, D]``."""
        weight_VD = self._model.quantize.embedding.weight.detach().float().cpu()
        return functional.normalize(weight_VD, dim=1) if self.family == "janus" else weight_VD

    def to(self, device: torch.device) -> None:
        self.device = torch.device(device)
        for name in ("_model", "_decoder"):
            vars(self).pop(name, None)

    def fit(self, image: np.ndarray) -> np.ndarray:
        """An image of any size, brought to ``[*pixels, 3]``."""
        return fitted(image, self.pixels, self.fit_kind, FAMILIES[self.family][1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the VQ model's settings and weights; changes whenever a code could."""
        described = [self.family, *map(list, self._scale), self._weights_hash()]
        if self.fit_kind != "crop":
            described.append(self.fit_kind)
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def _weights_hash(self) -> str:
        # settings that the names and shapes of the tensors do not show
        structure = [str(getattr(self.config, name, None)) for name in STRUCTURE]
        digest = hashlib.sha256(json.dumps(structure).encode())
        for name, tensor in sorted(read_vq_weights(self.path).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __getstate__(self):
        # weights, and what was computed from them, do not travel to loader workers: each worker reads them again
        return {name: value for name, value in vars(self).items() if name not in ("_model", "_decoder", "fingerprint")}

    @cached_property
    def _scale(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the channels, for pixels from 0 to 1."""
        file = self.path / "preprocessor_config.json"
        if self.family == "emu3" and file.is_file():
            settings = json.loads(file.read_text())
            return settings["image_mean"], settings["image_std"]
        return [0.5] * 3, [0.5] * 3

    @cached_property
    def _model(self) -> Any:
        if self.expected and self.expected != self.fingerprint:
            raise ConfigError(
                f"vocabulary.image_tokenizer.path: {self.path} holds another VQ model than the run began with\n"
                "  do:    put that one back, or begin another run"
            )
        model_class = getattr(transformers, FAMILIES[self.family][0])
        with torch.device("meta"):
            model = model_class(self.config)
        weights = {name: tensor.float() for name, tensor in read_vq_weights(self.path).items()}
        try:
            missing, _ = model.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:
            raise ConfigError(_broken(self.path, f"its weights do not fit its config.json: {error}")) from error
        if missing:
            raise ConfigError(_broken(self.path, f"{len(missing)} of its tensors are missing, the first is {missing[0]}"))
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def _decoder(self) -> Any:
        # bfloat16 holds the 8 bits of a pixel; a copy, because encoding stays in float32
        if self.device.type != "cuda":
            return self._model
        model_class = getattr(transformers, FAMILIES[self.family][0])
        half = model_class(self.config).to(self.device, torch.bfloat16).eval().requires_grad_(False)
        half.load_state_dict(self._model.state_dict())
        return half

    def _batches(self, array: np.ndarray):
        size = max(1, BATCH_PIXELS // math.prod(self.pixels))
        return (array[begin : begin + size] for begin in range(0, len(array), size))

    @torch.no_grad()
    def _encode(self, images_NHWC: np.ndarray) -> torch.Tensor:
        mean_C, std_C = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in self._scale)
        x_NCHW = torch.from_numpy(images_NHWC).to(self.device).permute(0, 3, 1, 2)
        x_NCHW = functional.pixel_unshuffle((x_NCHW / 255 - mean_C) / std_C, self.patch)
        # TF32 would make codes depend on the GPU
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if self.family == "emu3":
                sizes = torch.tensor([self.pixels] * len(x_NCHW))
                codes = torch.stack(self._model.encode(x_NCHW, sizes, return_dict=True).image_tokens)
            elif self.family == "chameleon":
                codes = self._model.encode(x_NCHW, return_dict=True).image_tokens
            else:
                codes = nearest_direction(latents(self._model, x_NCHW), self._model.quantize.embedding.weight)
        return codes.view(len(x_NCHW), self.height, self.width)

    @torch.no_grad()
    def _decode(self, codes_Nhw: torch.Tensor) -> np.ndarray:
        model, codes_Nhw = self._decoder, codes_Nhw.to(self.device)
        if self.family == "emu3":
            x_NCHW = model.decode(codes_Nhw)
        else:
            x_NCHW = reconstruct(model, functional.normalize(model.quantize.embedding(codes_Nhw), dim=-1).permute(0, 3, 1, 2))
        x_NHWC = functional.pixel_shuffle(x_NCHW.float(), self.patch).permute(0, 2, 3, 1)
        mean_C, std_C = (torch.tensor(x, device=self.device) for x in self._scale)
        return ((x_NHWC * std_C + mean_C) * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def latents(model: Any, x_NCHW: torch.Tensor) -> torch.Tensor:
    """Latents of a Janus model for images, as directions ``[N, C, h, w]``, each of length 1."""
    return functional.normalize(model.quant_conv(model.encoder(x_NCHW)), dim=1)


def nearest_direction(z_NChw: torch.Tensor, codebook_VC: torch.Tensor) -> torch.Tensor:
    """The code with the smallest angle to each latent ``[N, h, w]``."""
    return torch.einsum("nchw,vc->nvhw", z_NChw, functional.normalize(codebook_VC, dim=1)).argmax(1)


def reconstruct(model: Any, z_NChw: torch.Tensor) -> torch.Tensor:
    """Images that a Janus model decodes from quantised latents, in its own range and channels."""
    return model.decoder(model.post_quant_conv(z_NChw))


def read_vq_config(path: Path) -> tuple[str, transformers.PreTrainedConfig]:
    """Family and configuration of the VQ model in a folder; reads no weights.

    Raises:
        ConfigError: If the folder holds no VQ model.
    """
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"vocabulary.image_tokenizer.path: {path} holds no config.json\n"
            "  do:    give a folder as save_pretrained writes it, or train one with `megavlm data image-tokenizer`"
        )
    tree = json.loads((path / "config.json").read_text())
    family = str(tree.get("model_type")).removesuffix("_vqgan")
    if family not in FAMILIES:
        raise ConfigError(
            f"vocabulary.image_tokenizer.path: {path} holds a model of type {tree.get('model_type')!r}, not a VQ model\n"
            f"  do:    give the folder of a model of {', '.join(FAMILIES)}, or of its VQ model alone"
        )
    config_class = getattr(transformers, FAMILIES[family][0] + "Config")
    return family, config_class(**(tree if tree["model_type"].endswith("_vqgan") else tree.get("vq_config") or {}))


def read_vq_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the VQ model in a folder: those below ``vqmodel.``, or all if no name starts so."""
    places = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    inside = {name: file for name, file in places.items() if "vqmodel." in name}
    weights = {}
    for file in sorted(set((inside or places).values())):
        with safe_open(file, "pt") as tensors:
            chosen = [name for name, place in (inside or places).items() if place == file]
            weights |= {name.split("vqmodel.")[-1]: tensors.get_tensor(name) for name in chosen}
    if not weights:
        raise ConfigError(_broken(path, "it holds no safetensors"))
    return weights


def _broken(path: Path, detail: str) -> str:
    return f"vocabulary.image_tokenizer.path: {path} is not a complete VQ model: {detail}\n  do:    copy or save it again"
