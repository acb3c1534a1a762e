"""The pack: one micro-batch of whole samples laid end to end, no padding, with its route. Tested by `tests/model/test_backbone.py`.

Letters: R rows with features, or of blocks; F numbers of a feature, P codes of a block.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample, Layout, Span
from megavlm.data.pack.patches import ABSENT, Patches, Sizes, find_patches, layout_in_patches, sample_in_patches, targets_of
from megavlm.data.read.sample import Coordinates
from megavlm.errors import MegavlmError
from megavlm.randomness import Purpose, stream
from megavlm.routing.builder import build_route
from megavlm.routing.phases import Moment, Phases
from megavlm.routing.route import BIAS_WIDTH, PackLayout, Route, Sequences, Stage
from megavlm.routing.tasks import TASKS, Task


@dataclass
class Pack:
    """T tokens of S samples, M of them with something to predict.

    Host side: everything but the tensors, which ``to`` moves.
    """

    lane: int
    step: int
    keys: list[str]
    coordinates: list[Coordinates]
    tasks: list[int]
    """The samples' own tasks ``[S]``."""
    sequences: Sequences
    """Boundaries of the samples."""
    route: Route
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    """Place of each token in its sample."""
    rows_M: torch.Tensor
    """Rows that predict a token with a loss, ascending."""
    targets_M: torch.Tensor
    """The ids they predict; ``[M, P]`` in packs with blocks, as `megavlm.data.pack.patches.targets_of` says."""
    groups_M: torch.Tensor
    """Which (source, task) each counts for: ``source * len(TASKS) + task``."""
    feature_rows_R: torch.Tensor
    """Rows that are read as features instead of the embedding of their token."""
    features_RF: torch.Tensor
    """Those features, float32; F is 0 if there are none."""
    patch_rows_R: torch.Tensor
    """Rows of blocks, which are the means of their codes' embeddings."""
    patch_ids_RP: torch.Tensor
    """Ids of those codes, `ABSENT` where a block has fewer; P is 0 in packs without blocks."""
    labels: np.ndarray
    """Number of labelled tokens, each code of a block one, per (source, task) ``[num_sources * len(TASKS)]``."""
    task_flops: np.ndarray
    """Forward FLOPs per stage, after routing, and of the output head, by the samples' task ``[num_stages + 1, len(TASKS)]``."""
    dense_flops: np.ndarray
    """Forward FLOPs without a route, head included, by the samples' task ``[len(TASKS)]``."""
    kept_tokens: np.ndarray
    """Image tokens that go through all of each stage, for understanding and generation ``[num_stages, 2]``."""
    image_tokens: np.ndarray
    """Codes of images, for understanding and generation ``[2]``."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens_T)

    @property
    def flops(self) -> np.ndarray:
        """Forward FLOPs per stage, after routing, and of the output head ``[num_stages + 1]``."""
        return self.task_flops.sum(1)

    @property
    def task_labels(self) -> np.ndarray:
        """Number of labelled rows per task ``[len(TASKS)]``."""
        return self.labels.reshape(-1, len(TASKS)).sum(0)

    def map_tensors(self, function) -> "Pack":
        """A copy with ``function`` applied to every tensor, the route's included."""
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        sequences, route = self.sequences.map_tensors(function), self.route.map_tensors(function)
        return replace(self, sequences=sequences, route=route, **tensors)

    @property
    def has_patches(self) -> bool:
        """Whether blocks of codes may be single tokens."""
        return self.patch_ids_RP.shape[1] > 0

    def with_dense_route(self) -> "Pack":
        """The same tokens with every one of them active in every layer.

        Raises:
            MegavlmError: If blocks of codes are single tokens: that pack has other rows without its route.
        """
        if self.has_patches:
            raise MegavlmError("a pack of patches has no dense twin of as many rows\n  do:    compare a run with another policy")
        num_layers = self.route.stages[-1].end_layer
        return replace(self, route=Route([Stage(0, num_layers, self.sequences, None)]))

    def to(self, device: torch.device) -> "Pack":
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Pack":
        return self.map_tensors(torch.Tensor.pin_memory)


class Costing:
    """What samples cost under the routes of a run: the vector that the packer equalises.

    Args:
        phases: The run's routing plans.
        shape: Sizes of the model.
    """

    def __init__(self, phases: Phases, shape: ModelShape):
        self.phases = phases
        self.shape = shape
        # layouts recur, and so do steps at which the shares are the same
        self._cached = lru_cache(maxsize=65536)(self._flops)
        self._cached_rows = lru_cache(maxsize=65536)(self._rows)
        self.dense_flops = lru_cache(maxsize=65536)(self._dense_flops)

    def __reduce__(self):
        return Costing, (self.phases, self.shape)  # the cache does not travel

    def flops(self, layout: Layout, step: int) -> np.ndarray:
        """Forward FLOPs per stage, after routing, and of the output head ``[num_stages + 1]`` of one sample."""
        return self._cached(*self.at(layout, step))

    def rows(self, layout: Layout, step: int) -> int:
        """Rows of one sample, summed over the layers: what is held of it for the backward pass grows with them."""
        return self._cached_rows(*self.at(layout, step))

    def at(self, layout: Layout, step: int) -> tuple[Layout, Moment]:
        """A sample as it is at a step, where blocks of its codes may be single tokens, and what its route depends on."""
        moment = self.phases.moment(step)
        sizes = self.phases.plans[moment.phase].patch_sizes(moment.strength)
        return (layout_in_patches(layout, sizes) if max(sizes) > 1 else layout), moment

    def _rows(self, layout: Layout, moment: Moment) -> int:
        return int((self.phases.layers_per_stage * sum(self.active_and_guests(layout, moment))).sum())

    def _flops(self, layout: Layout, moment: Moment) -> np.ndarray:
        active_s, guests_s = self.active_and_guests(layout, moment)
        plan = self.phases.plans[moment.phase]
        bias_s = BIAS_WIDTH * plan.merged_spans(*_spans(layout), moment.strength).any(1)
        _, silent_s, without_mlp_s = plan.left_out(*_spans(layout), moment.strength)
        of_layer_s = self.shape.layers_flops(
            active_s, active_s + guests_s, bias_s, silent_tokens=silent_s, tokens_without_mlp=without_mlp_s
        )
        stages = self.phases.layers_per_stage * of_layer_s
        if self.shape.windows:
            stages = stages - self.shape.unseen_flops(active_s + guests_s, self.phases.bounds, bias_s)
        return np.append(stages, layout.num_labels * self.shape.head_flops_per_row)

    def active_and_guests(self, layout: Layout, moment: Moment) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one sample in each stage: those that travel, and those that only give keys and values."""
        plan = self.phases.plans[moment.phase]
        lengths, tasks = _spans(layout)
        dropped_s, _, _ = plan.left_out(lengths, tasks, moment.strength)
        prompt_s = layout.num_prompt * plan.injects(Task.GENERATION)
        guests_s = prompt_s + lengths[tasks == Task.UNDERSTANDING].sum() * plan.injects(Task.UNDERSTANDING)
        return layout.num_tokens - dropped_s - prompt_s, guests_s

    def _dense_flops(self, layout: Layout) -> float:
        """Forward FLOPs of a sample without a route, head included."""
        layers = self.shape.num_layers * self.shape.layers_flops(layout.num_tokens)
        if self.shape.windows:
            layers = layers - self.shape.unseen_flops(np.array([layout.num_tokens]), [(0, self.shape.num_layers)])[0]
        return float(layers + layout.num_labels * self.shape.head_flops_per_row)


def _spans(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and tasks of a sample's image spans ``[N]``."""
    lengths, tasks = (np.array(x, np.int64) for x in (zip(*layout.spans) if layout.spans else ((), ())))
    return lengths, tasks


def build_pack(samples: list[EncodedSample], costing: Costing, num_sources: int, lane: int, *, step: int, seed: int) -> Pack:
    """Lay samples end to end and route them. A pure function of its arguments."""
    moment = costing.phases.moment(step)
    plan = costing.phases.plans[moment.phase]
    costs = np.array([costing.flops(sample.layout, step) for sample in samples])
    dense_flops = np.array([costing.dense_flops(sample.layout) for sample in samples])
    image_tokens = [sum(span.length for sample in samples for span in sample.spans if span.task == task) for task in range(2)]
    patches, samples = _in_patches(samples, plan.patch_sizes(moment.strength))
    lengths = np.array([sample.num_tokens for sample in samples])
    offsets = np.cumsum(lengths) - lengths
    spans = [span for sample in samples for span in sample.spans]
    starts = np.array([o + span.start for o, sample in zip(offsets, samples) for span in sample.spans], np.int64)
    rng = stream(seed, Purpose.SELECTION, lane, step)
    tokens = np.concatenate([sample.tokens for sample in samples])
    tasks = np.concatenate([sample.tasks for sample in samples])
    layouts = [sample.layout for sample in samples]
    labelled = np.flatnonzero(np.concatenate([sample.has_loss for sample in samples]))
    sources = np.repeat([sample.coordinates.source for sample in samples], [layout.num_labels for layout in layouts])
    groups = sources * len(TASKS) + tasks[labelled]
    layout = PackLayout(
        lengths=lengths,
        spans=spans,
        starts=starts,
        labelled_rows=labelled,
        prompt_rows=np.concatenate([offset + sample.prompt_places for offset, sample in zip(offsets, samples)]),
    )
    targets = targets_of(labelled, tokens, patches)
    of_task = np.eye(len(TASKS))[[sample.task for sample in samples]]
    kept_sN = plan.kept_tokens([s.length for s in spans], [s.task for s in spans], moment.strength)
    span_tasks = np.array([span.task for span in spans], np.int64)
    return Pack(
        lane=lane,
        step=step,
        keys=[sample.key for sample in samples],
        coordinates=[sample.coordinates for sample in samples],
        tasks=[sample.task for sample in samples],
        sequences=Sequences.of(lengths),
        route=build_route(plan, layout, moment.strength, rng),
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(np.arange(len(tokens)) - np.repeat(offsets, lengths)),
        rows_M=torch.from_numpy(labelled - 1),
        targets_M=torch.from_numpy(targets),
        groups_M=torch.from_numpy(groups),
        **_features(spans, starts),
        patch_rows_R=torch.from_numpy(patches.rows_R),
        patch_ids_RP=torch.from_numpy(patches.ids_RP),
        labels=_counted(groups, targets, num_sources * len(TASKS)),
        task_flops=costs.T @ of_task,
        dense_flops=dense_flops @ of_task,
        kept_tokens=np.stack([kept_sN[:, span_tasks == task].sum(1) for task in range(2)], axis=1),
        image_tokens=np.array(image_tokens),
    )


def _in_patches(samples: list[EncodedSample], sizes: Sizes) -> tuple[Patches, list[EncodedSample]]:
    short = [sample_in_patches(sample, sizes) for sample in samples] if max(sizes) > 1 else samples
    return find_patches(samples, short, sizes), short


def _counted(groups_M: np.ndarray, targets_M: np.ndarray, num_groups: int) -> np.ndarray:
    """How many targets each group has."""
    if targets_M.ndim == 2:
        groups_M = np.repeat(groups_M, (targets_M != ABSENT).sum(1))
    return np.bincount(groups_M, minlength=num_groups)


def _features(spans: list[Span], starts: np.ndarray) -> dict[str, torch.Tensor]:
    """The rows of a pack that are read as features, and those."""
    found = [(start + span.features.places_R, span.features.values_RF) for span, start in zip(spans, starts) if span.features]
    rows, values = zip(*found) if found else ([np.zeros(0, np.int64)], [np.zeros((0, 0), np.float32)])
    return {"feature_rows_R": torch.from_numpy(np.concatenate(rows)), "features_RF": torch.from_numpy(np.concatenate(values))}
