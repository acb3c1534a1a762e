"""Taking rows that come once each."""

import pytest
import torch

from megavlm.routing.rows import put_rows, take_rows


@pytest.mark.parametrize("shape", [(9,), (9, 4), (9, 2, 3)])
@pytest.mark.parametrize("rows", [[], [0], [1, 4, 8], [7, 0, 3], list(range(9))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_and_gradients_are_those_of_index_select(shape, rows, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    rows = torch.tensor(rows, dtype=torch.int64)
    expected = x.index_select(0, rows)
    upstream = torch.randn_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    found = take_rows(x, rows)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    assert found.equal(expected) and gradient.equal(expected_gradient)


def test_the_backward_pass_adds_nothing_up():
    """On a GPU adding is atomic: slow, and of open order."""
    x = torch.randn(9, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        take_rows(x, torch.tensor([2, 5])).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::index_copy_" in names
    assert not {"aten::index_add_", "aten::index_add", "aten::scatter_add_"} & names


def test_rows_are_put_among_zeros_and_nothing_is_saved():
    """A recomputed layer would otherwise stop behind the module, after ZeRO-3 has released its weights."""
    rows, saved = torch.tensor([4, 0, 2]), []
    x_PD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        put_KD = put_rows(x_PD, rows, 6)
    assert put_KD.equal(torch.zeros(6, 2, dtype=torch.float64).index_copy(0, rows, x_PD)) and not saved
    assert torch.autograd.gradcheck(lambda x: put_rows(x, rows, 6), x_PD)
    assert put_rows(x_PD[:0], rows[:0], 4).equal(torch.zeros(4, 2, dtype=torch.float64))
