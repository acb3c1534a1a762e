"""Rows of a pack that are taken once each: the backward pass copies them back instead of adding them up."""

import torch


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x.index_select(0, rows)`` for rows that differ from each other; the gradient is the same.

    The backward pass of `index_select` must add, since rows might come twice; on a GPU by atomic operations, whose order is open.

    Args:
        x: ``[T, …]``.
        rows: int64, none of them twice.
    """
    return _Taken.apply(x, rows)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.num_rows, *gradient.shape[1:]).index_copy_(0, rows, gradient), None
