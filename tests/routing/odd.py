"""Policies as a user might write them: any share, draw and nesting in any layer, gates among them."""

from typing import Literal

import torch
from hypothesis import assume
from hypothesis import strategies as st

from megavlm.errors import ConfigError
from megavlm.routing.plan import RoutingPlan
from megavlm.routing.policies import LayerPlan, Policy, Selector
from megavlm.routing.selectors import register_selector
from tests.model.reference import CONTENT, Seen
from tests.routing.layouts import NUM_LAYERS


class Odd(Policy):
    """Its layers are its setting."""

    policy: Literal["odd"] = "odd"
    plans: list[tuple[float, int, bool, str]]
    selector: Selector = "random"

    def layers(self, num_layers: int) -> list[LayerPlan]:
        return [LayerPlan(*plan) for plan in self.plans]


@register_selector("follows_the_text", on_device=True, needs_attention=True)
def follows_the_text(evidence, candidates):
    """A user's selector: its first key against the queries behind the image, and a little of the stream."""
    score_C = 0.1 * evidence.h_TD[candidates.rows_C, 0]
    for n in range(len(candidates.lengths)):
        query_d = evidence.q_THd[candidates.question_rows_Q[candidates.question_span_Q == n], 0].sum(0)
        is_own_C = candidates.span_C == n
        score_C = score_C + is_own_C * (evidence.k_THd[candidates.rows_C, 0] @ query_d)
    return score_C


def _follows_the_text(seen: Seen) -> list[float]:
    query = sum((seen.q[p, 0] for p in seen.question), torch.zeros(seen.q.shape[2], dtype=seen.q.dtype))
    return [float(0.1 * seen.h[p, 0] + seen.k[p, 0] @ query) for p in seen.places]


CONTENT["follows_the_text"] = _follows_the_text

SHARES = st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])
HOWS = st.sampled_from(["select"] * 5 + ["gate", "skip_mlp", "show"])


@st.composite
def odd_policies(draw, is_drawn: bool) -> Odd:
    plans = []
    for _ in range(NUM_LAYERS):
        share, nested, how = draw(SHARES), draw(st.booleans()), draw(HOWS)
        if how == "gate":
            nested = False
        if nested and plans:
            share = min(share, plans[-1][0])
        plans.append((share, draw(st.integers(0, 2)), nested, how))
    if is_drawn:
        plans[-1] = (1.0, 0, False, "select")
    names = ["random", "stride", "stratified"]
    names += [] if is_drawn else [*CONTENT]
    return Odd(plans=plans, selector=draw(st.sampled_from(names)))


@st.composite
def odd_routes(draw) -> tuple[Odd, Odd]:
    """Policies for both tasks that are not refused together."""
    policies = draw(odd_policies(False)), draw(odd_policies(True))
    try:
        RoutingPlan(*policies, NUM_LAYERS)
    except ConfigError:
        assume(False)
    return policies
