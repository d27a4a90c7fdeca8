"""Moving token copies into the order of experts and back, so that results do not depend on chance.

Shape letters: T tokens, K copies of each (chosen experts), N copies that are sent, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def copies_in_order(x_TH: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """Row order[i] // K of x as row i. Backward puts each copy's gradient in its place and adds up K of them
    in a fixed order: no two writes meet."""
    return _Copies.apply(x_TH, order_N, top_k)


def weighted_sum(y_NH: Tensor, weights_TK: Tensor, order_N: Tensor) -> Tensor:
    """[T, H]: each token's copies, put back in place, times their weights, added up in a fixed order.

    Copies that were never sent count as zero. Weights come before places: backward keeps the rows that are
    here, and not a row for every copy that any rank may hold.
    """
    tokens, top_k = weights_TK.shape
    weights_N = weights_TK.to(y_NH.dtype).flatten().index_select(0, order_N)
    y_NH = y_NH * weights_N.unsqueeze(-1)
    return placed(y_NH, order_N, tokens * top_k).view(tokens, top_k, -1).sum(1)


def placed(y_NH: Tensor, order_N: Tensor, rows: int) -> Tensor:
    """Row i of y as row order[i] of `rows` rows, zero elsewhere."""
    return _Placed.apply(y_NH, order_N, rows)


class _Placed(torch.autograd.Function):
    """Keeps the order alone, where torch's own index_copy keeps what it places too."""

    @staticmethod
    def forward(ctx: Any, y_NH: Tensor, order_N: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(order_N)
        everywhere = y_NH.new_zeros if y_NH.shape[0] < rows else y_NH.new_empty
        return everywhere(rows, y_NH.shape[-1]).index_copy_(0, order_N, y_NH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        return grads[0].index_select(0, order_N), None, None


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, order_N: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.shape, ctx.top_k = x_TH.shape, top_k
        return x_TH.index_select(0, order_N // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        tokens, hidden = ctx.shape
        grad_NH = grads[0]
        if order_N.shape[0] < tokens * ctx.top_k:
            full = grad_NH.new_zeros(tokens * ctx.top_k, hidden)
        else:
            full = grad_NH.new_empty(tokens * ctx.top_k, hidden)
        full.index_copy_(0, order_N, grad_NH)
        return full.view(tokens, ctx.top_k, hidden).sum(1), None, None


def reordered(x_NH: Tensor, order_N: Tensor) -> Tensor:
    """Row order[i] of x as row i, for a permutation; backward is the inverse one."""
    return _Reordered.apply(x_NH, order_N, torch.empty_like(order_N).scatter_(0, order_N, _count(order_N)))


def restored(x_NH: Tensor, order_N: Tensor) -> Tensor:
    """The inverse of `reordered`: row i of x as row order[i]."""
    return _Reordered.apply(x_NH, torch.empty_like(order_N).scatter_(0, order_N, _count(order_N)), order_N)


def _count(order_N: Tensor) -> Tensor:
    return torch.arange(order_N.shape[0], device=order_N.device)


class _Reordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_NH.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_N), None, None


ALIGNMENT_BYTES = 16
"""Rows of grouped_mm's operands start at multiples of this (torch 2.13)."""


def grouped_matmul(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times their expert's weight: [N, I] to [N, O].

    `counts` says how many rows each expert has, on the device. Widths that grouped_mm cannot align are
    multiplied expert by expert, which needs the counts on the host.
    """
    aligned = all(size * x_NI.element_size() % ALIGNMENT_BYTES == 0 for size in weight_EOI.shape[1:])
    if aligned:
        ends = counts_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends)
    parts = x_NI.split(counts_E.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True)])
