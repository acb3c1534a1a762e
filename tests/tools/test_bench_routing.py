"""What `tools/bench_routing.py` times is the passes alone, and every pass begins without gradients."""

import torch

from tools.bench_routing import Timer


def test_timed_passes_have_no_hooks_and_no_gradients_before_them():
    module, hooked, had_gradients = torch.nn.Linear(4, 4), [], []

    def forward():
        hooked.append(torch._C._autograd._top_saved_tensors_default_hooks(False) is not None)
        had_gradients.append(module.weight.grad is not None)
        return module(torch.ones(8, 4)).square().sum()

    measured = Timer(module, torch.device("cpu"), repeats=3).in_turn(first=forward, second=forward)
    assert hooked == [True] * 2 + [False] * 6
    assert not any(had_gradients)
    assert measured["first"]["saved_bytes"] == measured["second"]["saved_bytes"] > 0
    assert len(measured["first"]["totals"]) == 3
