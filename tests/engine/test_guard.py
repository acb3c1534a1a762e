"""Which steps are bad, and that a bad one leaves the optimizer as it was."""

import pytest
import torch

from megavlm.engine.guard import FaultConfig, Guard, GuardedAdamW

SETTINGS = FaultConfig(spike_window_steps=8, spike_sigmas=6.0)


def judge(guard, loss, norm, step=0):
    guard.expect(torch.tensor(loss), lambda: torch.tensor(norm))
    bad = bool(guard.found_inf)
    guard.end_step(step, f"context {step}")
    return bad


def filled(settings=SETTINGS):
    guard = Guard(settings, torch.device("cpu"))
    for step in range(settings.spike_window_steps):
        assert not judge(guard, 2.0 + 0.1 * (step % 2), 1.0 + 0.1 * (step % 2), step)
    guard.settle(keep=0)
    return guard


@pytest.mark.parametrize("pair", [(float("nan"), 1.0), (float("inf"), 1.0), (2.0, float("nan")), (2.0, float("inf"))])
def test_not_finite_is_bad_from_the_first_step_on(pair):
    guard = Guard(SETTINGS, torch.device("cpu"))
    assert judge(guard, *pair)
    (bad,) = guard.settle(keep=0)
    assert bad.reason == "not finite" and bad.context == "context 0"
    assert not judge(guard, 2.0, 1.0)


def test_a_spike_of_loss_or_norm_is_bad_once_the_window_is_full():
    young = Guard(SETTINGS, torch.device("cpu"))
    assert not judge(young, 2.0, 1.0) and not judge(young, 50.0, 1.0)
    guard = filled()
    # mean 2.05, deviation 0.053: the limit is 2.37
    assert not judge(filled(), 2.3, 1.0)
    assert judge(guard, 2.6, 1.0)
    assert judge(guard, 2.6, 1.0), "what was refused has not become usual"
    assert judge(guard, 2.0, 9.0)
    assert [bad.reason for bad in guard.settle(keep=0)] == ["a spike"] * 3
    assert guard.num_skipped == guard.num_skipped_in_a_row == 3
    assert not judge(guard, 2.0, 1.0)
    guard.settle(keep=0)
    assert guard.num_skipped_in_a_row == 0


def test_what_was_usual_is_forgotten():
    guard = filled()
    guard.begin_anew()
    assert not judge(guard, 9.0, 9.0), "nothing is a spike until the window is full again"
    for step in range(SETTINGS.spike_window_steps - 1):
        assert not judge(guard, 9.0 + 0.1 * (step % 2), 9.0, step)
    assert judge(guard, 12.0, 9.0)


def test_the_verdict_of_the_last_step_may_wait():
    guard = filled()
    judge(guard, float("nan"), 1.0, 20)
    assert guard.settle(keep=1) == []
    judge(guard, 2.0, 1.0, 21)
    assert [bad.step for bad in guard.settle(keep=1)] == [20]


def test_state_goes_on():
    guard = filled()
    other = Guard(SETTINGS, torch.device("cpu"))
    other.load_state(guard.state())
    assert judge(other, 2.6, 1.0) and not judge(other, 2.3, 1.0)
    shorter = Guard(FaultConfig(spike_window_steps=4), torch.device("cpu"))
    shorter.load_state(guard.state())
    assert not judge(shorter, 2.6, 1.0), "another window begins anew"


def test_a_refused_step_changes_neither_weights_nor_moments_nor_counters():
    guard = Guard(SETTINGS, torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = GuardedAdamW([weight], guard, lr=0.1, weight_decay=0.1)
    weight.grad = torch.arange(5.0)
    judge(guard, 2.0, 1.0)
    optimizer.step()
    before = weight.detach().clone(), {name: value.clone() for name, value in optimizer.state[weight].items()}
    assert before[1]["step"] == 1 and not before[0].equal(torch.ones(5))
    weight.grad = torch.full((5,), float("nan"))
    judge(guard, 2.0, float("inf"))
    optimizer.step()
    assert weight.equal(before[0])
    assert all(value.equal(before[1][name]) for name, value in optimizer.state[weight].items())
    plain = torch.nn.Parameter(torch.ones(5))
    reference = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)
    plain.grad = torch.arange(5.0)
    reference.step()
    torch.testing.assert_close(weight, plain)
