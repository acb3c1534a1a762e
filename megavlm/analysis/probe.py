"""How much the losses rise when image tokens are away from some layers: candidates for a route, measured without training on them.

    late_drop   images that are read: all their tokens leave after l layers and never come back
    away        images that are drawn: their tokens carry the loss, so they cannot leave for good. All of them skip layers l to L-2 and come
                back for the last layer, L-1. A prediction has then seen the image in l+1 of L layers; the prompt's tokens pass through all
    bypass      either kind: a share of every image's tokens, chosen at random, goes through layers l to L-2; the others skip these layers

Each candidate is tried alone, with the other kind of image dense, on the samples that have images of its kind; the others cannot change.
The losses are the model's own cross-entropies per task. The model was trained without the candidate, so the rise orders its layers; it does
not predict a training with the route.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.analysis.subject import build_packs
from megavlm.costs import ModelShape
from megavlm.data.pack.encode import EncodedSample
from megavlm.data.pack.pack import Costing, Pack
from megavlm.model.backbone import Backbone
from megavlm.routing.phases import Phases
from megavlm.routing.policies import Dense, LateDrop, LayerPlan, Policy, Tread
from megavlm.routing.tasks import TASKS, Task, TaskName

SPAN_KINDS = {"understanding": Task.UNDERSTANDING, "generation": Task.GENERATION}


class Away(Policy):
    """Every image token skips a block of layers: a bypass that keeps none, which no recipe can name."""

    policy: str = "away"
    first_layer: int
    """First layer without image tokens."""

    def layers(self, num_layers: int) -> list[LayerPlan]:
        dense, none = LayerPlan(), LayerPlan(0.0)
        return [dense if layer < self.first_layer or layer == num_layers - 1 else none for layer in range(num_layers)]


@dataclass(frozen=True)
class Candidate:
    """A policy for one kind of image, and what it costs and saves."""

    task: str
    """Whose images: `understanding` are read, `generation` drawn."""
    policy: Policy
    layer: int
    """The first layer that image tokens skip."""
    rise_t: np.ndarray
    """Rise of the mean loss of each task of `TASKS`, in nats per labelled token."""
    weighted_rise: float
    """Rise of the training's loss: the rises of the tasks times their weights."""
    saved_flops: float
    """Forward FLOPs of the probe's packs that the policy saves."""

    @property
    def rise_per_saved_exaflop(self) -> float:
        """Rise of the training's loss per 10^18 saved FLOPs; 0 where nothing is saved."""
        return self.weighted_rise / self.saved_flops * 1e18 if self.saved_flops else 0.0


@dataclass(frozen=True)
class Measured:
    """The losses of packs, and the cost of their forward pass."""

    loss_sums_t: np.ndarray
    labels_t: np.ndarray
    flops: float
    dense_flops: float

    @property
    def losses_t(self) -> np.ndarray:
        """Mean cross-entropy per labelled token of each task, NaN without any."""
        with np.errstate(invalid="ignore"):
            return self.loss_sums_t / self.labels_t


@torch.no_grad()
def measure(backbone: Backbone, packs: Sequence[Pack], device) -> Measured:
    """Run packs along their routes."""
    sums_t, labels_t = np.zeros(len(TASKS)), np.zeros(len(TASKS))
    for pack in packs:
        sums = backbone(pack.to(device))[: backbone.num_groups].double().cpu().numpy()
        sums_t += sums.reshape(-1, len(TASKS)).sum(0)
        labels_t += pack.task_labels
    flops, dense = (sum(float(x.sum()) for x in xs) for xs in ([p.flops for p in packs], [p.dense_flops for p in packs]))
    return Measured(sums_t, labels_t, flops, dense)


class Probe:
    """Measures candidates on one model and one set of samples.

    Args:
        backbone: The backbone, whole in this one process.
        shape: Its sizes.
        groups: The samples of each pack.
        num_sources: Number of sources of the backbone's configuration.
        task_weights: Weights of the tasks in the training's loss.
        device: Where the backbone is.
    """

    def __init__(
        self,
        backbone: Backbone,
        shape: ModelShape,
        groups: list[list[EncodedSample]],
        num_sources: int,
        *,
        task_weights: Mapping[TaskName, float],
        device: torch.device,
    ):
        self.backbone = backbone
        self.shape = shape
        self.groups = groups
        self.num_sources = num_sources
        self.weights_t = np.array([task_weights.get(task, 1.0) for task in TASKS])
        self.device = device
        self.dense = measure(backbone, self.packs(groups, Dense(), Dense()), device)
        self._affected = {
            task: [kept for group in groups if (kept := [s for s in group if any(span.task == kind for span in s.spans)])]
            for task, kind in SPAN_KINDS.items()
        }
        self._before = {
            task: measure(backbone, self.packs(affected, Dense(), Dense()), device) for task, affected in self._affected.items()
        }

    def packs(self, groups: list[list[EncodedSample]], understanding: Policy, generation: Policy) -> list[Pack]:
        """Run the samples along a route."""
        phases = Phases.always(understanding, generation, self.shape.num_layers)
        return build_packs(groups, Costing(phases, self.shape), self.num_sources)

    def try_out(self, task: str, policy: Policy, layer: int) -> Candidate:
        """Measure one policy for one kind of image."""
        policies = (policy, Dense()) if task == "understanding" else (Dense(), policy)
        before = self._before[task]
        after = measure(self.backbone, self.packs(self._affected[task], *policies), self.device)
        rise_t = (after.loss_sums_t - before.loss_sums_t) / np.maximum(self.dense.labels_t, 1)
        return Candidate(task, policy, layer, rise_t, float(self.weights_t @ rise_t), before.flops - after.flops)

    def flops_share(self, understanding: Policy, generation: Policy) -> float:
        """A route's forward FLOPs as a share of the samples' dense ones; nothing is run."""
        packs = self.packs(self.groups, understanding, generation)
        return sum(pack.flops.sum() for pack in packs) / self.dense.dense_flops

    def curves(self, tell: Callable = lambda work: work) -> list[Candidate]:
        """`late_drop` and `away` at every layer.

        Args:
            tell: Wraps the list of candidates, to show progress.
        """
        num_layers = self.shape.num_layers
        todo = [("understanding", LateDrop(after_layer=layer), layer) for layer in range(1, num_layers)]
        todo += [("generation", Away(first_layer=layer), layer) for layer in range(1, num_layers - 1)]
        return [self.try_out(*one) for one in tell(todo) if self._affected[one[0]]]

    def bypasses(self, keep_ratios: Sequence[float], tell: Callable = lambda work: work) -> list[Candidate]:
        """A bypass from every layer to the last but one, at every share, for both kinds of images."""
        todo = [
            (task, Tread(keep_ratio=ratio, first_layer=layer, end_layer=-1), layer)
            for task in SPAN_KINDS
            for ratio in keep_ratios
            for layer in range(1, self.shape.num_layers - 1)
        ]
        return [self.try_out(*one) for one in tell(todo) if self._affected[one[0]]]
