"""A small VQ image tokenizer of one's own, trained on the images of shards: a Janus VQ model of `transformers`.

VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) with an encoder and decoder as in VQGAN (arXiv 2012.09841), without its perceptual and
adversarial losses::

    x ── encoder ──▶ z, scaled to length 1 ── nearest code q ──▶ decoder ──▶ x'
    loss = |x - x'| + (x - x')² + 0.25 (z - stop(q))²              the gradient of q goes straight through to z

Codes are directions (arXiv 2110.04627). They follow the moving average of the latents that chose them (appendix A.1 of the VQ-VAE). A
code that is chosen too rarely is dead, and moves to a latent of the current batch. Latents with a large error are drawn more often (random
restarts: Jukebox, arXiv 2005.00341; a threshold on the moving average: SoundStream, arXiv 2107.03312).
"""

import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.cluster import MiniBatchKMeans
from torch.nn import functional
from transformers import JanusVQVAE, JanusVQVAEConfig

from megavlm.errors import DataError, MegavlmError
from megavlm.image_tokenizers.vq import VQTokenizer, latents, nearest_direction, reconstruct
from megavlm.randomness import Purpose, integer_seed, stream
from megavlm.system.files import folder_written_atomically, write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.pictures import save_grid
from megavlm.system.progress import progress

log = logging.getLogger(__name__)

COMMITMENT = 0.25
FREE_SHARE = 0.1
"""In this first share of the steps nothing is quantised: codes placed on the latents of an untrained encoder would all be alike."""
KMEANS_BATCHES = 16
"""The first codes are made from the last so many batches of that time."""
DECAY = 0.98
"""Decay of the codebook's moving averages, per step."""
DEAD_BELOW = 0.1
"""A code is dead when its average use is below this share of an even use."""
RESTARTS_END = 0.8
"""After this share of the steps dead codes stay where they are, so that the decoder learns the final ones."""
HELD_OUT_EVERY, MAX_HELD_OUT = 20, 1000


@dataclass(frozen=True)
class Plan:
    """Sizes and steps of the training."""

    codebook_size: int = 512
    height: int = 8
    """Rows of codes."""
    width: int = 8
    """Columns of codes."""
    pixels: int = 32
    """Height of the images; their width follows. A power of two times the rows of codes, at least 2."""
    steps: int = 1500
    batch_images: int = 32
    learning_rate: float = 1e-3
    channels: int = 64
    """Channels at the finest levels, a multiple of 32; twice as many from the third level on."""
    max_images: int = 50_000
    """Most images to read; they are held in memory."""
    seed: int = 0

    def model_config(self) -> JanusVQVAEConfig:
        """The model's configuration: pixels enter as patches of 2 x 2, and every level halves the grid once more.

        Raises:
            MegavlmError: If the sizes do not fit together.
        """
        factor = self.pixels // self.height
        if self.pixels % self.height or factor < 2 or factor & (factor - 1):
            raise MegavlmError(
                f"{self.pixels} pixels cannot become {self.height} rows of codes\n"
                "  do:    choose pixels = 2, 4, 8, 16 or 32 times the height"
            )
        if self.channels % 32:
            raise MegavlmError(f"channels is {self.channels}\n  do:    choose a multiple of 32, the number of groups of its norms")
        num_levels = factor.bit_length() - 1
        return JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=self.codebook_size,
            latent_channels=self.channels,
            in_channels=12,
            out_channels=12,
            base_channels=self.channels,
            channel_multiplier=[1, 1, 2, 2, 4][:num_levels],
            num_res_blocks=1,
            num_patches=self.height,
        )


def train_tokenizer(images: Iterable[np.ndarray], out: Path, plan: Plan, device: str = "cpu") -> dict:
    """Train on images and write a folder that `VQTokenizer` reads.

    The folder also gets ``metrics.json`` (the returned metrics) and ``reconstructions.png`` (held-out images, and below them their
    reconstructions).

    Args:
        images: uint8 RGB ``[H, W, 3]``, of any sizes.
        out: Folder to write; must not exist.
        plan: Sizes and steps.
        device: Where to train.

    Returns:
        Metrics of the held-out images (every 20th): peak signal-to-noise ratio in dB, share of the codes used, perplexity of the codes.
    """
    if out.exists():
        raise MegavlmError(f"{out} exists already\n  do:    name another folder, or remove it")
    config = plan.model_config()
    # a folder without training is enough to cut images to size
    images_NHWC = _fitted(images, plan)
    held_out = np.arange(len(images_NHWC)) % HELD_OUT_EVERY == 0
    begin = time.perf_counter()
    model = _train(images_NHWC[~held_out], config, plan, torch.device(device))
    seconds = time.perf_counter() - begin
    with folder_written_atomically(out) as files:
        model.save_pretrained(files)
    tokenizer = VQTokenizer(out, plan.height, plan.width, device)
    kept = images_NHWC[held_out][:MAX_HELD_OUT]
    codes_Nhw = tokenizer.encode(kept)
    decoded = tokenizer.decode(codes_Nhw)
    metrics = {
        "held_out_images": len(kept),
        **reconstruction_metrics(kept, decoded),
        **codebook_metrics(codes_Nhw, plan.codebook_size),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_images": int((~held_out).sum()),
        **asdict(plan),
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1))
    shown = min(12, len(kept))
    with harmless(f"the picture {out / 'reconstructions.png'}"):
        save_grid([*kept[:shown], *decoded[:shown]], [""] * 2 * shown, out / "reconstructions.png", columns=shown)
    return metrics


def reconstruction_metrics(images_NHWC: np.ndarray, decoded_NHWC: np.ndarray) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB, mean over images. An exact image counts with a squared error of 1/12."""
    error_N = ((images_NHWC.astype(np.float64) - decoded_NHWC) ** 2).mean((1, 2, 3)).clip(1 / 12)
    return {"psnr_db": round(float((10 * np.log10(255**2 / error_N)).mean()), 2)}


def codebook_metrics(codes: np.ndarray, codebook_size: int) -> dict[str, float]:
    """Share of the codes that occur, and their perplexity: how many evenly used codes would be as hard to guess."""
    share_V = np.bincount(codes.reshape(-1), minlength=codebook_size) / codes.size
    entropy = -(share_V[share_V > 0] * np.log(share_V[share_V > 0])).sum()
    return {"codes_used": round(float((share_V > 0).mean()), 4), "perplexity": round(float(np.exp(entropy)), 1)}


class Codebook:
    """A codebook whose codes follow the latents that choose them.

    Args:
        weight_VC: The model's codebook; written to.
        z_MC: First latents; the first codes are their cluster centres.
        seed: Seed of the clusters and the random restarts.
    """

    def __init__(self, weight_VC: torch.Tensor, z_MC: torch.Tensor, seed: int):
        self.weight_VC = weight_VC
        self.generator = torch.Generator().manual_seed(seed)
        clusters = MiniBatchKMeans(len(weight_VC), batch_size=4096, n_init=cast(Any, 1), random_state=seed).fit(z_MC.cpu().numpy())
        self.sum_VC = torch.from_numpy(clusters.cluster_centers_).to(weight_VC)
        self.count_V = torch.ones(len(weight_VC), device=weight_VC.device)
        weight_VC.copy_(functional.normalize(self.sum_VC, dim=1))

    @torch.no_grad()
    def update(self, z_MC: torch.Tensor, codes_M: torch.Tensor, restart: bool) -> int:
        """Move codes towards their latents; with ``restart`` also revive dead ones. Returns how many were revived."""
        num_codes = len(self.weight_VC)
        # counts in units of an even use
        chosen_V = torch.bincount(codes_M, minlength=num_codes) * (num_codes / len(codes_M))
        sums_VC = torch.zeros_like(self.sum_VC).index_add_(0, codes_M, z_MC) * (num_codes / len(codes_M))
        self.count_V.lerp_(chosen_V, 1 - DECAY)
        self.sum_VC.lerp_(sums_VC, 1 - DECAY)
        dead = torch.nonzero(self.count_V < DEAD_BELOW)[:, 0] if restart else codes_M[:0]
        if len(dead):
            error_M = (z_MC - self.weight_VC[codes_M]).square().sum(1).cpu() + 1e-12
            places = torch.multinomial(error_M, len(dead), generator=self.generator).to(z_MC.device)
            self.sum_VC[dead], self.count_V[dead] = z_MC[places], 1.0
        self.weight_VC.copy_(functional.normalize(self.sum_VC, dim=1))
        return len(dead)


def _train(images_NHWC: np.ndarray, config: JanusVQVAEConfig, plan: Plan, device: torch.device) -> JanusVQVAE:
    torch.manual_seed(integer_seed(plan.seed, Purpose.MODULES))
    model: Any = JanusVQVAE(config)
    model.to(device).train()
    model.quantize.embedding.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    rng = stream(plan.seed, Purpose.SAMPLE)
    codebook, order, seen, num_revived = None, np.zeros(0, np.int64), [], 0
    free_steps = max(1, int(FREE_SHARE * plan.steps))
    for step in progress(range(plan.steps), "train the image tokenizer"):
        if len(order) < plan.batch_images:
            order = np.concatenate([order, rng.permutation(len(images_NHWC))])
        batch, order = images_NHWC[order[: plan.batch_images]], order[plan.batch_images :]
        x_NCHW = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        x_NCHW = functional.pixel_unshuffle(x_NCHW, 2)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _schedule(step, plan.steps)
        z_NChw = latents(model, x_NCHW)
        z_MC = z_NChw.detach().permute(0, 2, 3, 1).flatten(0, 2)
        if step >= free_steps and codebook is None:
            codebook = Codebook(model.quantize.embedding.weight.data, torch.cat(seen), plan.seed)
        if codebook is None:
            q_NChw, seen = z_NChw, [*seen, z_MC][-KMEANS_BATCHES:]
        else:
            codes_Nhw = nearest_direction(z_NChw, codebook.weight_VC)
            q_NChw = functional.embedding(codes_Nhw, codebook.weight_VC).permute(0, 3, 1, 2)
        decoded_NCHW = reconstruct(model, z_NChw + (q_NChw - z_NChw).detach())
        difference = decoded_NCHW - x_NCHW
        reconstruction = difference.abs().mean() + difference.square().mean()
        loss = reconstruction + COMMITMENT * (z_NChw - q_NChw.detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if codebook is not None:
            num_revived += codebook.update(z_MC, codes_Nhw.flatten(), step % 10 == 9 and step < RESTARTS_END * plan.steps)
        if step % 100 == 99:
            log.info("step %d/%d  reconstruction %.4f  codes revived %d", step + 1, plan.steps, reconstruction.item(), num_revived)
    return model.eval()


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over a twentieth of the steps, then a cosine to a hundredth."""
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)


def _fitted(images: Iterable[np.ndarray], plan: Plan) -> np.ndarray:
    size = (plan.pixels // plan.height * plan.width, plan.pixels)
    chosen = islice(images, plan.max_images)
    fitted = [np.asarray(ImageOps.fit(Image.fromarray(image), size, Image.Resampling.BICUBIC)) for image in chosen]
    if len(fitted) < HELD_OUT_EVERY:
        raise DataError(f"there are {len(fitted)} raw images, too few to hold one of {HELD_OUT_EVERY} out", "give more shards")
    return np.stack(fitted)
