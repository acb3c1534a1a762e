#!/usr/bin/env python
"""How much of the saved FLOPs becomes saved time: every routing policy, next to what a user would use instead.

    python tools/bench_routing.py --out docs/results/bench_routing            # about 11 minutes on 2 CPU cores
    python tools/bench_routing.py --width=2048 --num_layers=16 --out docs/results/bench_routing_cuda     # on a GPU

Forward and backward passes of one packed micro-batch, dense and routed in turn, in one process. For each policy: FLOPs as a
share of dense by formula (`megavlm.costs`), time as a share of dense, forward and backward apart, and the *realised saving*: saved time
over saved FLOPs. Memory is what the forward pass keeps for the backward pass, counted in a pass that is not timed. Writes OUT.json and
OUT.png.

Two peers run beside it, with the subsets of `random_ltd` in each layer. **masked**: tokens are masked as keys instead of removed, as in a
first implementation. **DeepSpeed random-LTD**: its own layer wrapper around the same decoder layers, on a padded batch. On a CPU its three
CUDA kernels are replaced by torch indexing of the same meaning. It does not gather rotary tables, so its positions are those of a shorter
sequence.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional

from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample, Span
from megavlm.data.pack.pack import Costing, Pack, build_pack
from megavlm.data.read.sample import Coordinates
from megavlm.model.backbone import Backbone, make_causal_lm
from megavlm.parts.trained import to_bfloat16
from megavlm.routing import policies as p
from megavlm.routing.phases import Phases
from megavlm.routing.tasks import Task

VOCABULARY = 1024
GATHERED = "everything kept, gathered anyway"


def policies(num_layers: int) -> dict[str, tuple[p.Policy, p.Policy]]:
    """(understanding, generation) under the name that the table shows."""
    third = max(1, num_layers // 3)
    tread = partial(p.Tread, first_layer=1, end_layer=-1)
    ltd, dense = p.RandomLTD(keep_ratio=0.5), p.Dense()
    return {
        GATHERED: (tread(keep_ratio=1.0), tread(keep_ratio=1.0)),
        "late_drop": (p.LateDrop(after_layer=third), dense),
        "pyramid": (p.Pyramid(), dense),
        "pyramid, question_attention": (p.Pyramid(selector="question_attention"), dense),
        "late_entry": (p.LateEntry(at_layer=third), dense),
        "random_ltd": (ltd, ltd),
        "tread": (tread(), tread()),
        "shared_bypass": (p.SharedBypass(keep_ratio=0.25), p.SharedBypass(keep_ratio=0.5)),
        "shared_bypass, redundancy": (p.SharedBypass(keep_ratio=0.25, selector="redundancy"), p.SharedBypass()),
        "visible_bypass": (p.VisibleBypass(keep_ratio=0.25), p.VisibleBypass()),
        "sparse_mlp": (p.SparseMLP(), p.SparseMLP()),
        "mixture_of_depths": (p.MixtureOfDepths(), p.MixtureOfDepths()),
        "merge": (p.Merge(at_layer=1), dense),
        "kv_injection, both": (p.KVInjection(), p.KVInjection()),
    }


def make_samples(pack_tokens: int, image_side: int) -> list[EncodedSample]:
    """Samples of one length, half of each task, an image and some text each."""
    image = image_side**2
    length = pack_tokens // max(2, 2 * round(pack_tokens / (image + 64) / 2))
    rng = np.random.default_rng(0)
    samples = []
    for index in range(pack_tokens // length):
        reads = index % 2 == 0
        has_loss = np.zeros(length, bool)
        span = Span(2, image_side, image_side, False) if reads else Span(length - image - 2, image_side, image_side, True)
        if reads:
            has_loss[-8:] = True
        else:
            has_loss[span.start - 1 :] = True
        task = Task.UNDERSTANDING if reads else Task.GENERATION
        tokens = rng.integers(VOCABULARY, size=length)
        place = Coordinates(0, 0, 0, index)
        samples.append(EncodedSample(str(index), place, tokens, has_loss, np.full(length, task), (span,), task))
    return samples


class Timer:
    """Times forward and backward passes of several ways in turn. No pass adds to the gradients of the one before it."""

    def __init__(self, backbone: torch.nn.Module, device: torch.device, repeats: int):
        self.backbone = backbone
        self.device = device
        self.repeats = repeats

    def forget_gradients(self) -> None:
        self.backbone.zero_grad(set_to_none=True)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def in_turn(self, **ways) -> dict[str, dict]:
        """Median seconds of each way's forward and backward pass, bytes held between the two, and both passes' sum in every repeat."""
        seconds = {name: {"forward": [], "backward": []} for name in ways}
        held = {}
        for name, forward in ways.items():  # warms up; counting takes time, so nothing is timed
            with SavedBytes() as saved:
                loss = forward()
            held[name] = saved.total
            loss.backward()
            self.forget_gradients()
        for _ in range(self.repeats):
            for name, forward in ways.items():
                begin = self.now()
                loss = forward()
                middle = self.now()
                loss.backward()
                end = self.now()
                self.forget_gradients()
                seconds[name]["forward"].append(middle - begin)
                seconds[name]["backward"].append(end - middle)
        medians = {
            name: {part: statistics.median(values) for part, values in parts.items()} | {"saved_bytes": held[name]}
            for name, parts in seconds.items()
        }
        for name, parts in seconds.items():
            medians[name]["totals"] = [forward + backward for forward, backward in zip(*parts.values())]
        return medians


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass; every storage once."""

    def __init__(self):
        self.storages = {}

        def pack(tensor):
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def masked_forward(backbone: Backbone, pack) -> torch.Tensor:
    """The same computation with every row in every layer: inactive rows are masked as keys and their outputs thrown away."""
    model = backbone.causal_lm.model
    model.config._attn_implementation = "sdpa"
    h_TD = model.embed_tokens(pack.tokens_T)
    lengths = pack.sequences.lengths
    h_BLD = h_TD.view(len(lengths), lengths[0], -1)
    rotary = model.rotary_emb(h_BLD, pack.positions_T.view(len(lengths), -1))
    causal_LL = torch.ones(lengths[0], lengths[0], dtype=torch.bool, device=h_TD.device).tril()
    itself_LL = torch.eye(lengths[0], dtype=torch.bool, device=h_TD.device)
    for stage in pack.route.stages:
        active_T = torch.ones(pack.num_tokens, dtype=torch.bool, device=h_TD.device)
        if stage.active_K is not None:
            active_T = torch.zeros_like(active_T).index_fill(0, stage.active_K, True)
        active_BL = active_T.view(len(lengths), -1)
        mask = (causal_LL & active_BL[:, None]) | itself_LL
        for layer in model.layers[stage.first_layer : stage.end_layer]:
            out = layer(h_BLD, attention_mask=mask[:, None], position_embeddings=rotary)
            h_BLD = torch.where(active_BL[..., None], out, h_BLD)
    return head_loss(backbone, h_BLD.flatten(0, 1), pack)


def head_loss(backbone: Backbone, h_TD: torch.Tensor, pack) -> torch.Tensor:
    h_MD = backbone.causal_lm.model.norm(h_TD.index_select(0, pack.rows_M))
    return functional.cross_entropy(backbone.causal_lm.lm_head(h_MD).float(), pack.targets_M, reduction="sum")


class TorchKernels:
    """What DeepSpeed's CUDA kernels of random-LTD do, with torch indexing."""

    @staticmethod
    def token_sort_(indices, _length):
        return indices.sort(-1).values

    @staticmethod
    def token_gather(x_BLD, indices_BK, _batch_first):
        return x_BLD.gather(1, indices_BK.long()[..., None].expand(-1, -1, x_BLD.shape[2]))

    @staticmethod
    def token_scatter_(x_BLD, part_BKD, indices_BK, _batch_first):
        return x_BLD.scatter_(1, indices_BK.long()[..., None].expand_as(part_BKD), part_BKD)


def random_ltd_forward(backbone: Backbone, pack, kept_tokens: int):
    """DeepSpeed's wrapper around every layer but the first and the last; returns the forward pass."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    from deepspeed.ops.random_ltd import dropping_utils
    from deepspeed.runtime.data_pipeline.data_routing.basic_layer import RandomLayerTokenDrop

    if not torch.cuda.is_available():
        dropping_utils.random_ltd_module = TorchKernels
    model, lengths = backbone.causal_lm.model, pack.sequences.lengths
    num_dropping = len(model.layers) - 2

    class Scheduler:
        random_ltd_layer_num = num_dropping
        state = {"max_value": lengths[0]}

        def get_current_seq(self):
            return kept_tokens

    class Sliced(torch.nn.Module):
        """The wrapper hands over fewer tokens but no fewer positions."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x_BKD, rotary):
            rotary = tuple(table[:, : x_BKD.shape[1]] for table in rotary)
            return self.layer(x_BKD, attention_mask=None, position_embeddings=rotary)

    scheduler = Scheduler()
    settings = {
        "model_mask_name": None,
        "micro_batch_size": len(lengths),
        "hidden_state_order": "batch_seq_dim",
        "model_type": "decoder",
    }
    wrapped = [RandomLayerTokenDrop(Sliced(layer)).train() for layer in model.layers[1:-1]]
    for number, layer in enumerate(wrapped):
        layer.init_config(settings, scheduler, number)

    def forward() -> torch.Tensor:
        model.config._attn_implementation = "sdpa"
        h_BLD = model.embed_tokens(pack.tokens_T).view(len(lengths), lengths[0], -1)
        rotary = model.rotary_emb(h_BLD, pack.positions_T.view(len(lengths), -1))
        h_BLD = model.layers[0](h_BLD, attention_mask=None, position_embeddings=rotary)
        for layer in wrapped:
            h_BLD = layer(h_BLD, rotary=rotary)
        h_BLD = model.layers[-1](h_BLD, attention_mask=None, position_embeddings=rotary)
        return head_loss(backbone, h_BLD.flatten(0, 1), pack)

    return forward


def bench(
    width: int = 512,
    num_layers: int = 6,
    pack_tokens: int = 4096,
    image_side: int = 31,
    repeats: int = 5,
    only: str = "",
    out: str = "docs/results/bench_routing",
):
    """Measure every policy and the peers.

    Args:
        width: D; heads are 64 wide, the MLP 3 D.
        num_layers: Layers; more show better what a middle block saves.
        pack_tokens: Tokens of the micro-batch.
        image_side: Rows and columns of each image's grid of codes.
        repeats: Timed passes of each way.
        only: Names to measure, separated by semicolons; all of them if empty. Others are taken over from OUT.json.
        out: Files to write, without extension.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    architecture = {
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "head_dim": 64,
    }
    samples = make_samples(pack_tokens, image_side)
    path = Path(out).with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if only and path.exists() else {}
    names = [*policies(num_layers), "masked (random_ltd)", "DeepSpeed random-LTD"]
    wanted = [name.strip() for name in only.split(";")] if only else names
    for name in track([name for name in names if name in wanted], description="policies"):
        policy = policies(num_layers).get(name, policies(num_layers)["random_ltd"])
        phases = Phases.always(*policy, num_layers)
        torch.manual_seed(0)
        with device:  # a large model takes long to make on the host
            causal_lm = make_causal_lm(architecture, VOCABULARY)
            backbone = Backbone(causal_lm, phases, num_sources=1, max_labels=pack_tokens, chunk_rows=pack_tokens)
        if dtype == torch.bfloat16:
            to_bfloat16(backbone)
        shape = ModelShape.of(causal_lm.config)
        pack = build_pack(samples, Costing(phases, shape), num_sources=1, lane=0, step=0, seed=0)
        if name == GATHERED:  # the router's own price: it would leave rows alone where all are active
            pack.route.stages[1].active_K = torch.arange(pack.num_tokens)
        routed, dense = pack.to(device), pack.with_dense_route().to(device)
        share = pack.flops.sum() / pack.dense_flops.sum()
        ways: dict[str, Callable[[], torch.Tensor]] = {"dense": partial(_sum, backbone, dense), "way": partial(_sum, backbone, routed)}
        if name.startswith("masked"):
            ways["way"] = partial(masked_forward, backbone, routed)
        elif name.startswith("DeepSpeed"):
            # as many tokens per sample as random_ltd keeps on average, text included
            kept = round(np.mean(pack.route.stages[1].sequences.lengths))
            ways["way"] = random_ltd_forward(backbone, routed, kept)
        rows[name] = _row(share, Timer(backbone, device, repeats).in_turn(**ways))
    rows = {name: rows[name] for name in names if name in rows}
    result = {
        "command": f"python tools/bench_routing.py --width={width} --num_layers={num_layers} --pack_tokens={pack_tokens}"
        f" --image_side={image_side} --repeats={repeats}",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        if device.type == "cpu"
        else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "samples": len(samples),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    _show(result)
    _plot(result, path.with_suffix(".png"))


def _sum(backbone: Backbone, pack: Pack) -> torch.Tensor:
    return backbone(pack).sum()


def _row(share: float, measured: dict) -> dict[str, Any]:
    dense, way = measured["dense"], measured["way"]
    total = {name: parts["forward"] + parts["backward"] for name, parts in measured.items()}
    time_share = total["way"] / total["dense"]
    return {
        "flops_share": share,
        "time_share": time_share,
        "time_share_of_repeats": [a / b for a, b in zip(way["totals"], dense["totals"])],
        "forward_share": way["forward"] / dense["forward"],
        "backward_share": way["backward"] / dense["backward"],
        "realised_saving": (1 - time_share) / (1 - share) if share < 0.999 else None,
        "memory_share": way["saved_bytes"] / dense["saved_bytes"],
        "dense_s": total["dense"],
    }


def _show(result: dict) -> None:
    table = Table("policy", "FLOPs left", "time left", "lowest to highest", "forward", "backward", "realised saving", "saved for backward")
    for name, row in result["rows"].items():
        realised = "" if row["realised_saving"] is None else f"{row['realised_saving']:.2f}"
        flops, total, forward, backward = (f"{row[key]:.1%}" for key in ("flops_share", "time_share", "forward_share", "backward_share"))
        spread = f"{min(row['time_share_of_repeats']):.1%} to {max(row['time_share_of_repeats']):.1%}"
        table.add_row(name, flops, total, spread, forward, backward, realised, f"{row['memory_share']:.1%}")
    Console(width=150).print(table, result["command"], result["machine"])


def _plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["rows"])
    places = np.arange(len(names))
    figure, axis = pyplot.subplots(figsize=(9, 0.45 * len(names) + 1.6), layout="constrained")
    for offset, key, label, color in ((0.2, "flops_share", "FLOPs", "#9bb8d3"), (-0.2, "time_share", "time", "#2f5d8a")):
        axis.barh(places + offset, [result["rows"][name][key] for name in names], 0.38, label=label, color=color)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlabel("share of dense, forward and backward pass")
    axis.legend(loc="lower right")
    axis.set_title(result["command"].removeprefix("python tools/"), fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    fire.Fire(bench)
