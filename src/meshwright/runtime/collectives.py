"""Communication that autograd knows: what forward does, and what backward does in return.

Each function takes the group of an axis, or None for an axis of one rank, along which nothing is sent.
The pairs are those of the graph (`ir/dense.py`, `ir/experts.py`): gather and scatter, exchange and exchange,
nothing and all-reduce (Korthikanti et al., arXiv:2205.05198 §4.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Group = ProcessGroup | None

# torch 2.13 renames these two and warns of the old names, which are the only ones before it
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather_single(out: Tensor, x: Tensor, group: Group) -> None:
    """All ranks' x into one tensor; looked up in torch by each call, where a profile labels it."""
    getattr(dist, _GATHER)(out, x, group=group)


def reduce_scatter_single(out: Tensor, x: Tensor, group: Group) -> None:
    """This rank's share of the sum into a tensor; looked up as `all_gather_single` is."""
    getattr(dist, _SCATTER)(out, x, group=group)


def gather(x: Tensor, group: Group) -> Tensor:
    """All ranks' x, one after another along dim 0; backward adds up their gradients and takes its own."""
    return x if group is None else _Gather.apply(x, group)


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """This rank's share along dim 0 of the sum over ranks; backward gathers the shares' gradients."""
    return x if group is None else _ScatterSum.apply(x, group)


def sum_gradient(x: Tensor, group: Group) -> Tensor:
    """x as it is; backward adds up the ranks' gradients."""
    return x if group is None else _SumGradient.apply(x, group)


def sum_over(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks; backward passes the gradient on: every rank's loss has the same one."""
    return x if group is None else _SumOver.apply(x, group)


def sum_both(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, forward and backward: for sums from which ranks compute different things."""
    return x if group is None else _SumBoth.apply(x, group)


def exchange(x: Tensor, received: list[int], sent: list[int], group: Group) -> Tensor:
    """All-to-all along dim 0: `sent[i]` rows go to rank i, `received[i]` come from it.

    Raises ValueError where the rows do not add up: gloo would end the process without an exception.
    """
    if group is None:
        return x
    ranks = group.size()
    if len(sent) != ranks or len(received) != ranks or sum(sent) != x.shape[0] or min(*sent, *received) < 0:
        raise ValueError(
            f"{x.shape[0]} rows over {ranks} ranks cannot be sent as {sent}, received {received}"
        )
    return _Exchange.apply(x, received, sent, group)


def all_gather(x: Tensor, group: Group) -> Tensor:
    """All ranks' x along dim 0, outside of autograd."""
    if group is None:
        return x
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    all_gather_single(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """This rank's share along dim 0 of the sum, outside of autograd."""
    if group is None:
        return x
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    reduce_scatter_single(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over ranks in a tensor of its own, outside of autograd: what was passed in stays as it was."""
    if group is None:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op=op, group=group)
    return out


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """Equal all-to-all of whole numbers along dim 0, outside of autograd."""
    if group is None:
        return counts
    out = torch.empty_like(counts)
    dist.all_to_all_single(out, counts.contiguous(), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grads[0], ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather(grads[0], ctx.group), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0]
        out = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return out, None, None, None
