"""The packer alone: its limits hold for any look-ahead, and on the standard mixture it meets its target in the steady state."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.pack.packer import choose
from megavlm.data.tools.simulate import simulate, standard


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_a_pack_has_the_oldest_is_within_its_tokens_and_is_repeatable(num, num_stages, seed):
    rng = np.random.default_rng(seed)
    costs, tokens = rng.exponential(size=(num, num_stages)), rng.integers(1, 50, num)
    costs[:, rng.random(num_stages) < 0.3] = 0
    target = costs.mean(0) * rng.uniform(0, 10)
    first, again = (choose(costs, tokens, target, 100, rng=np.random.default_rng(seed)) for _ in range(2))
    assert first == again == sorted(set(first)) and first[0] == 0
    assert tokens[first].sum() <= 100


def test_stages_that_say_the_same_count_once():
    """26 layers with equal counts are one constraint, not 26."""
    rng = np.random.default_rng(0)
    costs, tokens = rng.exponential(size=(64, 2)), rng.integers(1, 50, 64)
    target = costs.mean(0) * 8
    wide = np.column_stack([costs[:, :1], np.repeat(costs[:, 1:] / 25, 25, axis=1)])
    wide_target = np.append(target[:1], np.repeat(target[1] / 25, 25))
    chosen = choose(costs, tokens, target, 10**6, rng=np.random.default_rng(1))
    assert chosen == choose(wide, tokens, wide_target, 10**6, rng=np.random.default_rng(1))


def test_the_standard_mixture_in_the_steady_state():
    """A few lanes of what `megavlm data simulate` shows for many."""
    result = simulate(standard(), num_lanes=6, num_steps=130, first_step=90)
    ours, rival = result["megavlm"], result["first_fit"]
    assert ours["total"]["worst"] < 1.005 and ours["stages_summed"]["mean"] < 1.015
    assert ours["token_use"] > 0.975 and ours["longest_wait_packs"] < 256
    assert rival["total"]["mean"] > 1.05
