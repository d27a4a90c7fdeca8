"""Places at experts of limited capacity: who is counted where, and who is dropped.

Nothing here waits for the device: with padding, the number of valid tokens and so the capacity stay a tensor.

Shape letters: T tokens of this rank, k choices of a token, E experts, N token copies in some order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meshwright.model import Router


def num_valid(num_tokens: int, valid_T: Tensor | None) -> int | Tensor:
    """Tokens that are no padding: a number, or a 0-dim int64 tensor when there is a mask."""
    return num_tokens if valid_T is None else valid_T.sum()


def ceil(value: float | Tensor) -> int | Tensor:
    """The smallest integer not below `value`, which is FP64 either way."""
    return value.ceil().long() if isinstance(value, Tensor) else math.ceil(value)


def capacity(num_tokens: int | Tensor, top_k: int, num_experts: int, factor: float) -> int | Tensor:
    """Copies that one expert takes from this rank: ceil(T·k/E·factor) (megatron-core 0.16.1, moe_utils.py:
    get_capacity). T is this rank's valid tokens. Beyond E a factor adds no place that a token could take, and
    its product would leave int64."""
    factor = min(factor, float(num_experts))
    tokens = num_tokens.double() if isinstance(num_tokens, Tensor) else num_tokens
    return ceil(tokens * top_k / num_experts * factor)


def count(experts_N: Tensor, num_experts: int, asked_N: Tensor | None = None) -> Tensor:
    """Copies at each expert: [E] int64, exact. `asked_N` (bool) leaves out copies that are False."""
    ones_N = torch.ones_like(experts_N) if asked_N is None else asked_N.to(torch.int64)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=experts_N.device)
    return counts_E.scatter_add_(0, experts_N, ones_N)


def places(experts_N: Tensor, num_experts: int, asked_N: Tensor | None = None) -> Tensor:
    """How many copies stand before each copy at its expert: [N] int64, by the order given.

    Copies with `asked_N` False take no place; their own is meaningless.
    """
    queue_N = experts_N if asked_N is None else experts_N.masked_fill(~asked_N, num_experts)
    order_N = queue_N.argsort(stable=True)
    counts_E = count(queue_N, num_experts + 1)
    starts_E = counts_E.cumsum(0) - counts_E
    within_N = torch.arange(len(queue_N), device=queue_N.device) - starts_E[queue_N[order_N]]
    return torch.empty_like(queue_N).scatter_(0, order_N, within_N)


def within(
    experts_N: Tensor,
    num_experts: int,
    limit: int | Tensor,
    order_N: Tensor | None = None,
    asked_N: Tensor | None = None,
) -> Tensor:
    """Which copies get one of their expert's `limit` places: [N] bool, as the copies stand.

    `order_N` names the copies first to last; without it they are served as they stand.
    """
    if order_N is None:
        kept_N = places(experts_N, num_experts, asked_N) < limit
    else:
        asked = None if asked_N is None else asked_N[order_N]
        served_N = places(experts_N[order_N], num_experts, asked) < limit
        kept_N = torch.empty_like(served_N).scatter_(0, order_N, served_N)
    return kept_N if asked_N is None else kept_N & asked_N


def drop(
    weights_Tk: Tensor, choices_Tk: Tensor, asked_Tk: Tensor | None, router: Router, num_experts: int
) -> Tensor:
    """Copies that stay within `capacity_factor`: [T, k] bool.

    `drop: probs` (the default, as Megatron's) serves the copies with the largest weights first, `position`
    the earlier tokens first; equal weights go by position (megatron-core 0.16.1, moe_utils.py:
    apply_router_token_dropping, where torch.topk leaves ties open).
    """
    assert router.capacity_factor is not None
    num_tokens, top_k = choices_Tk.shape
    tokens = num_valid(num_tokens, None if asked_Tk is None else asked_Tk[:, 0])
    limit = capacity(tokens, top_k, num_experts, router.capacity_factor)
    order_N = (
        None if router.drop == "position" else weights_Tk.flatten().argsort(stable=True, descending=True)
    )
    asked_N = None if asked_Tk is None else asked_Tk.flatten()
    return within(choices_Tk.flatten(), num_experts, limit, order_N, asked_N).view(num_tokens, top_k)
