"""How long a step takes, part by part. On a GPU kernels, launches and collectives run beside each other, so that of the last two only
what sticks out counts; on a CPU one comes after the other.

Tested by `tests/planner/test_plan.py`.
"""

from dataclasses import dataclass, replace

import numpy as np

from megavlm.costs import BACKWARD_FACTOR
from megavlm.planner.load import Load, Stage
from megavlm.planner.model import Model
from megavlm.planner.rates import Rates

ROW_BYTES = 6
"""Copies of a row in the full stream per stage, forward and backward: taken, written back."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they go into."""

    products: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    """All other kernels of the layers."""
    logits: float = 0.0
    """The cross-entropy; its product is among the products."""
    host: float = 0.0
    """Python, hooks and launches, where the device waits for them."""
    collectives: float = 0.0
    """Where nothing else goes on meanwhile."""
    waiting: float = 0.0
    """For the rank with the dearest pack."""
    optimizer: float = 0.0
    data: float = 0.0
    """Building packs, where the device waits for them."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: "StepTime") -> "StepTime":
        return StepTime(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, factor: float) -> "StepTime":
        return StepTime(**{name: value * factor for name, value in vars(self).items()})


@dataclass(frozen=True)
class Setup:
    """Who trains it."""

    rates: Rates
    world_size: int
    packs_per_rank: float
    imbalance: float = 1.0
    """Cost of the dearest packs of a step over that of the mean one."""
    pack_build_s: float = 0.0
    """Of one pack in one process."""
    sequence_parallel: int = 1
    """Processes that share a pack."""


def step_time(model: Model, load: Load, setup: Setup) -> StepTime:
    """Seconds of one optimizer step of all processes together."""
    rates, host = setup.rates, setup.rates.host
    pack = _outside_layers(model, load, setup)
    for stage, recomputed in zip(load.stages, model.recomputed_shares, strict=True):
        kernels = layer_time(model, stage, rates, tokens=load.tokens, recomputed=recomputed).times(1 / setup.sequence_parallel)
        host_s = host.layer_s + host.layer_and_rank_s * setup.world_size + host.kernel_s * model.layer.num_kernels
        collective_s = _layer_collectives(model, stage, setup)
        if host.runs_ahead:
            host_s = max(0.0, host_s - kernels.total)
            collective_s = max(0.0, collective_s - kernels.total - host_s)
        pack += replace(kernels, host=host_s, collectives=collective_s).times(stage.num_layers)
    waiting = pack.total * (setup.imbalance - 1)
    build_s = setup.pack_build_s
    if model.config.data.num_workers:
        build_s = max(0.0, build_s / model.config.data.num_workers - pack.total)
    step = replace(pack, waiting=waiting, data=build_s).times(setup.packs_per_rank)
    persistent = rates.collectives.seconds(model.persistent_parameters * model.item_bytes, setup.world_size)
    return step + StepTime(
        host=host.step_s,
        collectives=persistent,
        optimizer=rates.optimizer_s_per_parameter * model.num_parameters / setup.world_size,
    )


def layer_time(model: Model, stage: Stage, rates: Rates, *, tokens: float, recomputed: float) -> StepTime:
    """Kernels of one layer of a stage, forward and backward, for a pack."""
    shape, rows = model.shape, stage.rows
    passes = 1 + BACKWARD_FACTOR + recomputed
    products = 0.0
    for inner, columns, count in _matrices(model):
        # of experts each has its share of the rows
        of_each = rows * shape.active_experts / shape.num_experts if shape.num_experts and columns == shape.mlp_width else rows
        products += passes * 2 * rows * inner * columns * count / rates.products(of_each, inner, columns)
    products += passes * shape.injection_flops_per_token * stage.guests / rates.products(rows, shape.width, shape.width)
    squares_L = shape.layer_flops_per_square * stage.lengths_L.astype(np.float64) ** 2
    rates_L = np.array([rates.attention(length, shape.num_heads * shape.head_width) for length in stage.lengths_L])
    attention = passes * float(stage.samples_L @ (squares_L / rates_L))
    moved = model.layer.moved_bytes + recomputed * model.layer.forward_moved_bytes
    moved += ROW_BYTES * model.layer.input_bytes / stage.num_layers * tokens / rows
    kernel_bytes = rows * model.layer.moved_bytes / model.layer.num_kernels
    return StepTime(products=products, attention=attention, elementwise=rows * moved / rates.moved(kernel_bytes))


def _matrices(model: Model) -> list[tuple[int, int, int]]:
    """(inner width, columns, how many) of a layer's products."""
    shape = model.shape
    queries, keys = shape.num_heads * shape.head_width, shape.num_kv_heads * shape.head_width
    mlp = (shape.width, shape.mlp_width, shape.mlp_matrices * shape.active_experts)
    router = [(shape.width, shape.num_experts, 1)] if shape.num_experts else []
    return [(shape.width, queries, 2), (shape.width, keys, 2), mlp, *router]


def _outside_layers(model: Model, load: Load, setup: Setup) -> StepTime:
    """The output head, the embedding, and what a pack takes wherever it goes."""
    rates, shape = setup.rates, model.shape
    recomputed = float(model.num_chunks > 1)
    labels = load.labels / setup.sequence_parallel
    head = (1 + BACKWARD_FACTOR + recomputed) * labels * shape.head_flops_per_row
    rows = labels / model.num_chunks
    # read and written: the logits, in float32, their logarithms, and the same backwards
    num_logits = labels * shape.vocabulary_size
    outer_bytes = model.outer_parameters * model.item_bytes
    collectives = rates.collectives
    lasting = model.persistent_parameters / model.num_parameters
    gathered = model.gathers_per_pack * collectives.seconds((1 - lasting) * outer_bytes, setup.world_size)
    reduced = collectives.seconds(model.outer_parameters * 4, setup.world_size)
    return StepTime(
        products=head / rates.products(rows, shape.width, shape.vocabulary_size),
        logits=logit_traffic(model.item_bytes, recomputed) * num_logits / rates.logits(num_logits / model.num_chunks),
        host=rates.host.pack_s + rates.host.byte_s * model.num_parameters * model.item_bytes,
        collectives=gathered + reduced,
    )


def logit_traffic(item_bytes: int, recomputed: float) -> float:
    """Bytes that the cross-entropy's kernels move per logit."""
    forward = 8 + (0 if item_bytes == 4 else 6)
    backward = 12 + (0 if item_bytes == 4 else 6)
    return (1 + recomputed) * forward + backward


def _layer_collectives(model: Model, stage: Stage, setup: Setup) -> float:
    """Gathers and reductions of a layer for a pack, and the exchanges of those who share it."""
    collectives, size = setup.rates.collectives, setup.world_size
    lasting = model.persistent_parameters / model.num_parameters
    gathered = (1 - lasting) * model.layer_parameters * model.item_bytes
    seconds = model.gathers_per_pack * collectives.seconds(gathered, size) + collectives.seconds(model.layer_parameters * 4, size)
    if (shared := setup.sequence_parallel) > 1:
        shape = model.shape
        width = 2 * (shape.num_heads + max(shape.num_kv_heads, shared)) * shape.head_width
        # queries, keys, values and what comes out change hands, forward and backward
        seconds += 2 * collectives.seconds(stage.rows / shared * width * model.item_bytes, shared) + 6 * collectives.begin_s
    return seconds
