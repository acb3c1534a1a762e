"""A route for a target share of the FLOPs, from what the probe measured.

Candidates are `late_drop` and `tread` for images that are read, `tread` for images that are drawn. Of all pairs that meet the target, the
one with the smallest rise of the training's loss is taken. With ``shared`` both tasks get `shared_bypass` with the same block. The reason:
task-specific routes push the tasks onto different parameters (arXiv 2606.01503), and the probe, which trains nothing, cannot see that.

Tested by `tests/analysis/test_probe.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from megavlm.analysis.probe import Candidate, Probe
from megavlm.errors import MegavlmError
from megavlm.routing.policies import Dense, LateDrop, Policy, SharedBypass, Tread


@dataclass(frozen=True)
class Suggestion:
    """A route, with its cost and rise as the probe measured them."""

    understanding: Policy
    generation: Policy
    flops_share: float
    """Share of the forward FLOPs of the probe's packs, output head included; at most the target."""
    weighted_rise: float
    """Rise of the training's loss: the sum of the rises that each policy causes alone."""

    def recipe(self) -> str:
        """The ``routing`` block of a recipe."""
        policies = {"understanding": self.understanding, "generation": self.generation}
        block = {task: policy.model_dump(mode="json") for task, policy in policies.items()}
        return yaml.safe_dump({"routing": block}, sort_keys=False, default_flow_style=None, width=110)


def suggest(probe: Probe, candidates: Sequence[Candidate], flops_share: float, shared: bool = False) -> Suggestion:
    """The best route whose FLOPs are at most a share of the dense ones.

    Args:
        probe: Where the candidates come from.
        candidates: Measured ones.
        flops_share: The target, 0 to 1.
        shared: One block for both tasks.

    Raises:
        MegavlmError: If no pair of candidates saves so much; the message names the least share that is possible.
    """
    pairs = sorted(_shared_pairs(candidates) if shared else _pairs(candidates), key=lambda pair: (pair[2], -pair[3]))
    limit = flops_share * probe.dense.dense_flops
    for understanding, generation, rise, saved in pairs:
        # savings add up exactly where no sample has both kinds of images; where one has, the share itself decides
        if probe.dense.dense_flops - saved <= limit * (1 + 1e-9):
            share = probe.flops_share(understanding, generation)
            if share <= flops_share:
                return Suggestion(understanding, generation, share, rise)
    least = 1 - max((saved for *_, saved in pairs), default=0.0) / probe.dense.dense_flops
    raise MegavlmError(
        f"no tried route is at {flops_share:.0%} of these packs' dense FLOPs or less; the least is {least:.1%}\n"
        "  do:    ask for a larger share, or add smaller ones to keep_ratios"
    )


def _pairs(candidates: Sequence[Candidate]) -> list[tuple[Policy, Policy, float, float]]:
    """(understanding, generation, rise, saved FLOPs) of every pair of policies that a recipe can name."""
    dense = (Dense(), 0.0, 0.0)
    read = [dense, *(_choice(c) for c in candidates if c.task == "understanding" and isinstance(c.policy, (LateDrop, Tread)))]
    drawn = [dense, *(_choice(c) for c in candidates if c.task == "generation" and isinstance(c.policy, Tread))]
    return [(u, g, rise_u + rise_g, saved_u + saved_g) for u, rise_u, saved_u in read for g, rise_g, saved_g in drawn]


def _shared_pairs(candidates: Sequence[Candidate]) -> list[tuple[Policy, Policy, float, float]]:
    bypasses = [c for c in candidates if isinstance(c.policy, Tread)]
    found = []
    for layer in sorted({c.layer for c in bypasses}):
        whole = SharedBypass(keep_ratio=1.0, first_layer=layer)
        sides: dict[str, list[tuple[Policy, float, float]]] = {task: [(whole, 0.0, 0.0)] for task in ("understanding", "generation")}
        for candidate in bypasses:
            if candidate.layer == layer:
                sides[candidate.task].append(_choice(candidate, _as_shared(candidate.policy)))
        for u, rise_u, saved_u in sides["understanding"]:
            found += [(u, g, rise_u + rise_g, saved_u + saved_g) for g, rise_g, saved_g in sides["generation"]]
    return found


def _as_shared(policy: Policy) -> SharedBypass:
    assert isinstance(policy, Tread)
    return SharedBypass(keep_ratio=policy.keep_ratio, first_layer=policy.first_layer, end_layer=policy.end_layer)


def _choice(candidate: Candidate, policy: Policy | None = None) -> tuple[Policy, float, float]:
    return policy or candidate.policy, candidate.weighted_rise, candidate.saved_flops
