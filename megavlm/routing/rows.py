"""Rows of a pack that are taken once each, and put back: the backward pass copies them instead of adding them up."""

import torch


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x.index_select(0, rows)`` for rows that differ from each other; the gradient is the same.

    The backward pass of `index_select` must add, since rows might come twice; on a GPU by atomic operations, whose order is open.

    Args:
        x: ``[T, …]``.
        rows: int64, none of them twice.
    """
    return _Taken.apply(x, rows)


def put_rows(x: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Rows ``[P, …]`` at their places among zeros ``[num_rows, …]``.

    Nothing is saved for the backward pass. A recomputed layer stops at the last tensor that its forward pass saved. That has to be one of
    the layer's own modules: these run under ZeRO-3's hooks, which would release what the backward pass is about to use.

    Args:
        x: ``[P, …]``.
        rows: int64, none of them twice.
        num_rows: How many there are in all.
    """
    return _Put.apply(x, rows, num_rows)


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, num_rows):
        ctx.rows = rows
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.rows), None, None


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
