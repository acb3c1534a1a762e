"""Cross-entropy in chunks."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from megavlm.model.loss import chunked_loss


class Head(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 12])
@pytest.mark.parametrize("num_chunks", [1, 3, 5])
def test_sums_and_gradients_are_those_of_one_product(num_rows, num_chunks):
    head = Head(6, 11).double()
    h_MD = torch.randn(num_rows, 6, dtype=torch.float64, requires_grad=True)
    targets_M, groups_M = torch.randint(11, (num_rows,)), torch.randint(3, (num_rows,))
    factor_G = torch.tensor([1.0, 0.3, 2.0])
    parameters = (h_MD, *head.parameters())

    losses_M = functional.cross_entropy(head(h_MD).float(), targets_M, reduction="none")
    expected_G = torch.zeros(3).index_add(0, groups_M, losses_M)
    expected = torch.autograd.grad((expected_G * factor_G).sum(), parameters)
    head.calls = 0
    sums_G = chunked_loss(head, h_MD, targets_M, groups_M, num_groups=3, num_chunks=num_chunks)
    found = torch.autograd.grad((sums_G * factor_G).sum(), parameters)

    torch.testing.assert_close(sums_G, expected_G)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    # P7: as often on every rank, whatever its rows; a single chunk is not made again
    assert head.calls == (1 if num_chunks == 1 else 2 * num_chunks)
