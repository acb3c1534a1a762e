"""Stage 1 of UniCompress: train a plug-in (`megavlm.image_tokenizers.decompressor`) around a frozen tokenizer.

At first nothing is quantised. Then the codebook is placed on features of the last batches. From then on, entries that nothing chose for a
while restart on features of the current batch (random restarts: Jukebox, arXiv 2005.00341), until the last part of the training.

Letters: N images, h and w rows and columns of dense codes, K entries of the plug-in's codebook, V dense codes, D width.
Tested by `tests/image_tokenizers/test_compressed.py`.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megavlm.errors import DataError, MegavlmError
from megavlm.image_tokenizers.compressed import CompressedTokenizer, save_plug_in
from megavlm.image_tokenizers.compressor import PlugInSettings
from megavlm.image_tokenizers.decompressor import PlugIn
from megavlm.image_tokenizers.protocol import ImageTokenizer
from megavlm.randomness import Purpose, integer_seed, stream
from megavlm.system.files import folder_written_atomically, write_atomically
from megavlm.system.harmless import harmless
from megavlm.system.pictures import save_grid
from megavlm.system.progress import progress

log = logging.getLogger(__name__)

FREE_SHARE, RESTARTS_END = 0.1, 0.8
"""Shares of the steps: nothing is quantised before the first one, and no entry restarts after the second."""
CHECK_EVERY = 25
"""An entry that was not chosen in this many steps restarts."""
HELD_OUT_EVERY, MAX_HELD_OUT, NUM_SHOWN = 20, 1000, 16
IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Plan:
    """Steps and rates of the training."""

    steps: int = 2000
    batch_images: int = 64
    learning_rate: float = 1e-3
    """Peak of the learning rate; AdamW, linear warm-up over a twentieth of the steps, cosine to a hundredth."""
    regression_weight: float = 1.0
    """Weight of the regression beside the codes' cross-entropy."""
    max_images: int = 1_000_000
    """Images whose codes are held in memory."""
    seed: int = 0


def train_plug_in(
    codes_Nhw: np.ndarray,
    tokenizer: ImageTokenizer,
    codebook_VD: torch.Tensor | None,
    settings: PlugInSettings,
    *,
    out: Path,
    plan: Plan,
    device: str = "cpu",
) -> dict:
    """Train on dense codes and write a folder that `CompressedTokenizer` reads; every 20th image is held out.

    The folder also gets ``metrics.json`` (the returned metrics) and ``reconstructions.png`` (held-out images, decoded from their dense
    codes, and below them the restored ones).

    Args:
        codes_Nhw: Dense codes of all images.
        tokenizer: The tokenizer inside; decodes for the pictures.
        codebook_VD: Its embeddings, if it has any.
        settings: Sizes of the plug-in.
        out: Folder to write; must not exist.
        plan: Steps and rates.
        device: Where to train.
    """
    if out.exists():
        raise MegavlmError(f"{out} exists already\n  do:    name another folder, or remove it")
    if len(codes_Nhw) < HELD_OUT_EVERY:
        raise DataError(f"there are {len(codes_Nhw)} images, too few to hold one of {HELD_OUT_EVERY} out", "give more shards")
    held_out = np.arange(len(codes_Nhw)) % HELD_OUT_EVERY == 0
    plug_in, history = _train(torch.from_numpy(codes_Nhw[~held_out]), codebook_VD, settings, plan, device=torch.device(device))
    with folder_written_atomically(out) as files:
        save_plug_in(plug_in, files)
    compressed = CompressedTokenizer(out, tokenizer, device)
    metrics = {
        "training_images": int((~held_out).sum()),
        "dense_codes_per_image": settings.num_dense,
        "tokens_per_image": settings.num_tokens,
        "held_out": judge(compressed, codes_Nhw[held_out][:MAX_HELD_OUT], out / "reconstructions.png"),
        "history": history,
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1))
    return metrics


def judge(compressed: CompressedTokenizer, dense_Nhw: np.ndarray, picture: Path) -> dict:
    """Quality of held-out images after compressing and restoring.

    Returns:
        Share of the dense codes that are restored, each predicted from the right codes before it, and from restored ones; PSNR in dB
        between images decoded from restored and from the original dense codes (None if they are equal, or there is no decoder); share of
        the codebook's entries that are used, and their perplexity.
    """
    plug_in, device = compressed.plug_in, compressed.device
    batches = torch.from_numpy(dense_Nhw).split(IMAGES_AT_ONCE)
    with torch.no_grad():
        forced = sum(float(plug_in(batch.to(device))["accuracy"]) * len(batch) for batch in batches) / len(dense_Nhw)
    codes = compressed.compress(dense_Nhw)
    restored_Nhw = compressed.restore(codes)
    counts_K = np.bincount(codes[codes != compressed.separator], minlength=compressed.separator)
    shares_K = counts_K[counts_K > 0] / counts_K.sum()
    figures = {
        "images": len(dense_Nhw),
        "code_accuracy_teacher_forced": forced,
        "code_accuracy": float((restored_Nhw == dense_Nhw).mean()),
        "psnr_db": None,
        "codebook_used": float((counts_K > 0).mean()),
        "codebook_perplexity": float(np.exp(-(shares_K * np.log(shares_K)).sum())),
    }
    if compressed.has_decoder:
        before, after = (compressed.around.decode(codes_Nhw) for codes_Nhw in (dense_Nhw, restored_Nhw))
        error = np.square(before.astype(np.float64) - after).mean()
        figures["psnr_db"] = float(10 * math.log10(255**2 / error)) if error else None
        shown = [*before[:NUM_SHOWN], *after[:NUM_SHOWN]]
        with harmless(f"the picture {picture}"):
            save_grid(shown, ["dense"] * len(before[:NUM_SHOWN]) + ["restored"] * len(after[:NUM_SHOWN]), picture, columns=NUM_SHOWN)
    return figures


def _train(
    codes_Nhw: torch.Tensor, codebook_VD: torch.Tensor | None, settings: PlugInSettings, plan: Plan, *, device: torch.device
) -> tuple[PlugIn, list[dict]]:
    torch.manual_seed(integer_seed(plan.seed, Purpose.MODULES))
    plug_in = PlugIn(settings, codebook_VD).to(device).train()
    trained = [parameter for parameter in plug_in.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, plan.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    rng, order = stream(plan.seed, Purpose.SAMPLE), np.zeros(0, np.int64)
    begins, ends = int(FREE_SHARE * plan.steps), int(RESTARTS_END * plan.steps)
    features, chosen_K, history = [], torch.zeros(settings.codebook_size, device=device), []
    every_entry = torch.arange(settings.codebook_size, device=device)
    for step in progress(range(plan.steps), "train the plug-in"):
        if len(order) < plan.batch_images:
            order = np.concatenate([order, rng.permutation(len(codes_Nhw))])
        batch, order = codes_Nhw[order[: plan.batch_images]].to(device), order[plan.batch_images :]
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * _schedule(step, plan.steps)
        if step == begins and features:
            plug_in.quantizer.begin_anew(torch.cat(features), every_entry)
        found = plug_in(batch, quantised=step >= begins)
        loss = found["consistency"] + plan.regression_weight * found["regression"] + found["codebook"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        features = [*features, found["features"]][-8:]
        chosen_K += torch.bincount(found["indices"].flatten(), minlength=settings.codebook_size)
        if step % CHECK_EVERY == CHECK_EVERY - 1:
            if begins <= step < ends:
                plug_in.quantizer.begin_anew(found["features"], every_entry[chosen_K == 0])
            chosen_K.zero_()
        if step % max(1, plan.steps // 20) == 0 or step == plan.steps - 1:
            values = {name: found[name].item() for name in ("regression", "consistency", "codebook", "accuracy")}
            history.append({"step": step + 1, **values})
            log.info("step %d/%d  %s", step + 1, plan.steps, "  ".join(f"{name} {value:.4f}" for name, value in values.items()))
    return plug_in.eval(), history


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)
