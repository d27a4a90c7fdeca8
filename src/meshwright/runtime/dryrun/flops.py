"""FLOPs of the ops that do the work: matmuls, grouped matmuls, attention. A multiply-add counts as two.

PyTorch's own counter knows neither grouped matmuls nor attention on a processor, and counts attention without
its mask. Here attention counts the pairs of a query and a key that it may see, as the graph does
(`ir/graph.py`), and backward makes the scores again (arXiv:2307.08691 §3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

Formula = Callable[[tuple[Any, ...], Any], int]
"""FLOPs of an op from its arguments and its result."""


def _mm(args: tuple[Any, ...], out: Any) -> int:
    if args[0].dtype == torch.float64:
        return 0  # sums of the router's losses, which have a fixed order as products (`routing/losses.py`)
    return 2 * int(args[0].shape[0] * args[0].shape[1] * args[1].shape[1])


def _addmm(args: tuple[Any, ...], out: Any) -> int:
    return _mm(args[1:], out)


def _bmm(args: tuple[Any, ...], out: Any) -> int:
    if args[1].shape[-1] == 1:
        return 0  # a product with a vector: a norm's sum over its width
    return 2 * int(prod(args[0].shape) * args[1].shape[-1])


def grouped_mm(args: tuple[Any, ...], out: Any) -> int:
    """Rows that groups divide, times a matrix each: 2·rows·width·width, whichever of the three dims the
    groups divide."""
    x, y = args[0], args[1]
    if x.dim() == 3 and y.dim() == 3:
        return _bmm(args, out)
    rows, inner = x.shape[-2:]
    return 2 * int(rows * inner * y.shape[-1])


MATMULS: dict[Any, Formula] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
}
GROUPED: dict[Any, Formula] = {aten._grouped_mm.default: grouped_mm}
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def is_attention(func: Any) -> bool:
    """Whether an op is attention, forward or backward."""
    return func in (_FORWARD, _BACKWARD)


def attention_shape(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, bool] | None:
    """Queries, keys and values of an attention op, and whether it is the backward; None of other ops."""
    if func is _FORWARD:
        return args[0], args[1], args[2], False
    if func is _BACKWARD:
        return args[1], args[2], args[3], True
    return None


def attention(q: Tensor, v: Tensor, pairs: int, is_backward: bool) -> int:
    """FLOPs over `pairs` of a query and a key of one head and one sequence."""
    qk_dim, v_dim = q.shape[-1], v.shape[-1]
    each = 3 * qk_dim + 2 * v_dim if is_backward else qk_dim + v_dim
    return 2 * int(q.shape[0] * q.shape[1]) * pairs * each
