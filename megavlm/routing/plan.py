"""A policy for each task, resolved for a model: stages, and how many tokens are active in each (P4).

Letters: s stages.

Tested by `tests/routing/test_route.py`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from megavlm.errors import ConfigError
from megavlm.routing.checks import check_policies
from megavlm.routing.policies import PARTIAL, LayerPlan, Policy
from megavlm.routing.route import BIAS_WIDTH
from megavlm.routing.selectors import DEVICE_SELECTORS
from megavlm.routing.tasks import Task

FUSED_QUERIES = ("phi3",)
"""Families with one projection for queries, keys and values; tests/model/test_partial.py looks at all of them."""
WIDEST_HEAD = 256
"""Columns of an attention head that kernels take at most (FlashAttention)."""


def num_kept(length_tokens: np.ndarray, keep_ratio: np.ndarray) -> np.ndarray:
    """Active tokens of spans: the share rounded up, so that a share above 0 keeps at least one."""
    # a product that lies above a whole number by rounding alone is that number
    rounded_up = np.ceil(length_tokens * keep_ratio - 1e-9).astype(np.int64)
    return np.maximum(rounded_up, keep_ratio > 0)


class RoutingPlan:
    """A policy for each task, resolved for a model: stages, counts, and routes of packs.

    Args:
        understanding: Policy for image spans without a loss.
        generation: Policy for image spans with a loss.
        num_layers: Layers of the backbone.
        starts: Layers at which a stage begins although nothing changes there; it computes the same.

    Raises:
        ConfigError: If a policy does not fit the model or the task.
    """

    def __init__(self, understanding: Policy, generation: Policy, num_layers: int, starts: Sequence[int] = ()):
        self.selectors = [understanding.selector_name, generation.selector_name]
        self._patch_sizes = (understanding.patch_size, generation.patch_size)
        of_task = [understanding.layers(num_layers), generation.layers(num_layers)]
        check_policies(understanding, generation, of_task, num_layers)
        layer_plans = list(zip(*of_task, strict=True))
        begins = [i == 0 or i in starts or _begins_stage(layer_plans[i - 1], layer_plans[i]) for i in range(num_layers)]
        starts = [i for i in range(num_layers) if begins[i]]
        self.bounds = list(zip(starts, [*starts[1:], num_layers]))
        self.plans: list[tuple[LayerPlan, LayerPlan]] = [layer_plans[first] for first in starts]
        # an injected prompt leaves its image alone
        keeps_spans = [[plan.how == "inject" and task == Task.GENERATION for task, plan in enumerate(p)] for p in self.plans]
        ratios = np.array([[plan.keep_ratio for plan in plans] for plans in self.plans])
        self._ratios = np.where(keeps_spans, 1.0, ratios)
        self._injects = np.array([[plan.how == "inject" for plan in plans] for plans in self.plans])
        self._merges = np.array([[plan.how == "merge" for plan in plans] for plans in self.plans])
        self._shows = np.array([[plan.how == "show" for plan in plans] for plans in self.plans])
        self._skips_mlp = np.array([[plan.how in PARTIAL for plan in plans] for plans in self.plans])

    @property
    def has_patches(self) -> bool:
        """Whether blocks of codes are single tokens in training."""
        return max(self._patch_sizes) > 1

    def patch_sizes(self, strength: float) -> tuple[int, int]:
        """Codes along each side of a token's block, for images that are read and that are drawn."""
        return self._patch_sizes if strength else (1, 1)

    @property
    def num_stages(self) -> int:
        return len(self.bounds)

    @property
    def layers_per_stage(self) -> np.ndarray:
        return np.array([end - first for first, end in self.bounds])

    def injects(self, task: int) -> np.ndarray:
        """Whether each stage injects the rows of a task ``[num_stages]``."""
        return self._injects[:, task]

    def merged_spans(self, span_lengths: ArrayLike, span_tasks: ArrayLike, strength: float) -> np.ndarray:
        """In which of N spans tokens stand for several ``[num_stages, N]``: where a merge leaves fewer than there were."""
        if not self._merges.any():
            return np.zeros((self.num_stages, np.size(span_lengths)), bool)
        is_shorter_sN = self.kept_tokens(span_lengths, span_tasks, strength) < np.asarray(span_lengths, np.int64)
        return is_shorter_sN & self._merges[:, np.asarray(span_tasks, np.int64)]

    def left_out(self, span_lengths: ArrayLike, span_tasks: ArrayLike, strength: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many tokens of N spans each stage leaves out: of everything, of asking, and of the MLP, ``[num_stages]`` each.

        Tokens that do not ask do not go through the MLP either, and are counted in both.
        """
        lengths, tasks = np.asarray(span_lengths, np.int64), np.asarray(span_tasks, np.int64)
        left_sN = lengths - self.kept_tokens(lengths, tasks, strength)
        silent_sN, without_mlp_sN = left_sN * self._shows[:, tasks], left_sN * self._skips_mlp[:, tasks]
        return (left_sN - without_mlp_sN).sum(1), silent_sN.sum(1), without_mlp_sN.sum(1)

    def layers_that(self, how: str, task: int) -> list[int]:
        """Layers whose plan for a task is of this kind: they have modules of their own."""
        return [layer for (a, b), p in zip(self.bounds, self.plans) if p[task].how == how for layer in range(a, b)]

    def kept_tokens(self, span_lengths: ArrayLike, span_tasks: ArrayLike, strength: float) -> np.ndarray:
        """Active tokens ``[num_stages, N]`` of N spans at a strength of the schedule."""
        # injection is a matter of architecture: no schedule turns it off
        ratios = 1 - (1 - self._ratios) * np.where(self._injects, 1.0, strength)
        return num_kept(np.asarray(span_lengths, np.int64), ratios[:, np.asarray(span_tasks, np.int64)])

    def is_device_choice(self, task: int, plan: LayerPlan, strength: float) -> bool:
        """Whether the device decides which of a task's tokens are active: never where all are, but for gates, which scale them."""
        if plan.how == "gate":
            return True
        if plan.keep_ratio == 1 or strength == 0:
            return False
        return plan.how == "merge" or (plan.ranks and self.selectors[task] in DEVICE_SELECTORS)

    def looks_at_attention(self, task: int, plan: LayerPlan) -> bool:
        """Whether a choice of the device ranks by queries or keys of the layer before."""
        if plan.ranks:
            return DEVICE_SELECTORS[self.selectors[task]].needs_attention
        return plan.how == "merge"

    def check_family(self, family: str) -> None:
        """Refuse tokens that only show their keys and values where a model has one projection for these and queries.

        Raises:
            ConfigError: Naming the policy.
        """
        shows = any(plan.how == "show" and plan.keep_ratio < 1 for plans in self.plans for plan in plans)
        if shows and family in FUSED_QUERIES:
            raise ConfigError(
                f"routing: a bypass whose tokens still give keys and values needs a projection for queries alone, and {family} has one for"
                " all three\n"
                "  do:    choose another policy, such as shared_bypass, or another family"
            )

    def check_head_width(self, head_width: int) -> None:
        """Refuse a merge whose attention no kernel can compute.

        Raises:
            ConfigError: If heads of this width have no room for the bias of merged keys.
        """
        merges = any(plan.how == "merge" and plan.keep_ratio < 1 for plans in self.plans for plan in plans)
        if merges and head_width + BIAS_WIDTH > WIDEST_HEAD:
            widest = WIDEST_HEAD - BIAS_WIDTH
            raise ConfigError(
                f"routing.understanding: merge adds {BIAS_WIDTH} columns to attention heads; the model's are {head_width} wide, "
                f"and kernels take at most {WIDEST_HEAD}\n"
                f"  do:    choose another policy, or heads that are at most {widest} wide"
            )


def _begins_stage(before: tuple[LayerPlan, LayerPlan], plans: tuple[LayerPlan, LayerPlan]) -> bool:
    """Whether a layer decides for itself: its plan is another, or a gate's, which every layer has for itself."""
    return plans != before or any(plan.how == "gate" for plan in plans)
