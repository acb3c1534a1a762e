"""How the gradients of the tasks agree, block by block of the model.

A block is a part of a layer (its norms, q, k, v, o, its MLP), the embedding, the final norm, the head, or the gates and injectors of a
policy. Take two tasks a and b, with gradients g of their weighted losses as a step adds them up:

    cosine         g_a·g_b / (|g_a| |g_b|)
    norms          |g_a|, |g_b|
    interference   max(0, -cosine) min(|g_a|, |g_b|)

The interference is the length of the smaller gradient's projection on the direction against the larger one: the part that the two undo of
each other. PCGrad (Yu et al., NeurIPS 2020) removes exactly this part; here it is only measured.

All of it follows from dot products, which under ZeRO-3 are sums over the ranks' partitions: no gradient is ever gathered.

Letters: B blocks of parameters, T and t tasks, P partitions of parameters, G sums that the backbone gives.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import nn

from megavlm.data.pack.pack import Pack
from megavlm.engine.zero import begin_anew, local_gradients
from megavlm.routing.tasks import TASKS
from megavlm.system.world import World

PARTS = ("norms", "q", "k", "v", "o", "mlp")
"""Blocks of a layer."""
WHOLE = "all"
"""The block of all parameters."""


def block_of(name: str) -> str:
    """The block of a parameter by its name: `layer_03/q`, `embedding`, `head`, `final_norm`, `gates`, `injectors`."""
    if found := re.search(r"\.layers\.(\d+)\.(.*)", name):
        layer, rest = int(found[1]), found[2]
        projection = re.search(r"\b([qkvo])_proj\b", rest)
        part = "norms" if "norm" in rest else projection[1] if projection else "mlp"
        return f"layer_{layer:02d}/{part}"
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    return "final_norm" if name.endswith("model.norm.weight") else name.split(".", maxsplit=1)[0]


def blocks_of(module: nn.Module) -> list[str]:
    """The block of each trained parameter, in the order of ``module.named_parameters()``."""
    return [block_of(name) for name, p in module.named_parameters() if p.requires_grad]


@dataclass(frozen=True)
class Alignment:
    """Two tasks' gradients in one block."""

    cosine: float
    """NaN where one of the gradients is zero."""
    norms: tuple[float, float]
    interference: float


def align(products_BTT: np.ndarray, blocks: Sequence[str], tasks: Sequence[str]) -> dict[str, dict[str, Alignment]]:
    """``"a_b"`` → block → alignment, for every two tasks.

    Args:
        products_BTT: Dot products of the tasks' gradients in each block.
        blocks: Names of the B blocks.
        tasks: Names of the T tasks.
    """
    pairs = combinations(range(len(tasks)), 2)
    return {
        f"{tasks[a]}_{tasks[b]}": {block: _align(products[np.ix_([a, b], [a, b])]) for block, products in zip(blocks, products_BTT)}
        for a, b in pairs
    }


def _align(products_22: np.ndarray) -> Alignment:
    norms = np.sqrt(np.diagonal(products_22))
    cosine = products_22[0, 1] / norms.prod() if norms.all() else np.nan
    interference = max(0.0, -cosine) * norms.min() if norms.all() else 0.0
    return Alignment(float(cosine), tuple(norms.tolist()), float(interference))


def products(blocks: Sequence[str], gradients_TP: Sequence[Sequence[torch.Tensor]]) -> tuple[list[str], torch.Tensor]:
    """Dot products of gradients, by block and over the whole model.

    Args:
        blocks: The block of each of the P parameters.
        gradients_TP: For each task a tensor per parameter, or this rank's part of it.

    Returns:
        Names of the blocks, `WHOLE` as the last; their dot products, float64 ``[B, T, T]``.
    """
    names = list(dict.fromkeys(blocks))
    num_tasks, place = len(gradients_TP), {name: b for b, name in enumerate(names)}
    sums_BTT = torch.zeros(len(names), num_tasks, num_tasks, dtype=torch.float64, device=gradients_TP[0][0].device)
    for p, block in enumerate(blocks):
        for a in range(num_tasks):
            for b in range(a, num_tasks):
                product = (gradients_TP[a][p] * gradients_TP[b][p]).sum(dtype=torch.float64)
                sums_BTT[place[block], a, b] += product
                if a != b:
                    sums_BTT[place[block], b, a] += product
    return [*names, WHOLE], torch.cat([sums_BTT, sums_BTT.sum(0, keepdim=True)])


def factors_of_tasks(factor_G: torch.Tensor, labels_t: np.ndarray) -> dict[str, torch.Tensor]:
    """Task → the factors of a step's loss, all but that task's set to zero; for the tasks that have labels.

    They are zero and not left out, because every rank calls every module for every task (P7).

    Args:
        factor_G: The factor of each sum that the backbone gives, the gates' loss last.
        labels_t: Labelled tokens per task, the same on all ranks.
    """
    task_G = torch.arange(len(factor_G), device=factor_G.device) % len(TASKS)
    task_G[-1] = -1  # the gates belong to no task
    return {task: factor_G * (task_G == t) for t, task in enumerate(TASKS) if labels_t[t]}


def alone(backbone: nn.Module, packs: Iterable[Pack], factors: dict[str, torch.Tensor]) -> dict[str, dict[str, Alignment]]:
    """The alignment of the tasks in this one process.

    Args:
        backbone: A backbone whose parameters are not partitioned.
        packs: Packs on its device.
        factors: As `factors_of_tasks` gives them.
    """
    parameters, packs = [p for p in backbone.parameters() if p.requires_grad], list(packs)
    gradients = []
    for factor_G in factors.values():
        backbone.zero_grad()
        for pack in packs:
            (backbone(pack) * factor_G).sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
    backbone.zero_grad()
    names, products_BTT = products(blocks_of(backbone), gradients)
    return align(products_BTT.cpu().numpy(), names, list(factors))


def under_zero(
    engine, world: World, packs: list[Pack], factors: dict[str, torch.Tensor], *, before_pack: Callable[[Pack], None]
) -> dict[str, dict[str, Alignment]]:
    """The alignment of the tasks during training, between two steps. Called by all ranks together.

    It takes a forward and a backward pass of the step's packs per task, and memory for one partition of the gradients per task. The state
    of the training does not change.

    Args:
        engine: DeepSpeed's engine, at stage 3.
        world: The processes.
        packs: This rank's packs, on the host; as many on every rank.
        factors: As `factors_of_tasks` gives them from the factors of the step.
        before_pack: Called before each forward pass, as in the step itself.
    """
    gradients = []
    for factor_G in factors.values():
        begin_anew(engine)
        for pack in packs:
            before_pack(pack)
            engine.backward((engine(pack.to(world.device)) * factor_G).sum(), scale_wrt_gas=False)
        gradients.append(local_gradients(engine))
    begin_anew(engine)
    names, products_BTT = products(blocks_of(engine.module), gradients)
    products_BTT = world.sum(products_BTT.cpu().numpy())
    return align(products_BTT.cpu().numpy(), names, list(factors))
