"""Token copies to the ranks that hold their experts, and back.

Both dispatchers hand the experts rows sorted by local expert with the count of each, and take the outputs
back in the same order. Shape letters: T this rank's tokens, K chosen experts of each, N copies on their way,
R rows at the experts, E experts, L experts of this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.runtime.collectives import (
    Group,
    all_gather,
    exchange,
    exchange_counts,
    gather,
    scatter_sum,
)
from meshwright.runtime.permute import copies_in_order, placed, reordered, restored, weighted_sum
from meshwright.runtime.region import Setting

Experts = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, H] sorted by local expert and counts [L] to outputs [R, H]: partial sums under expert tensor
parallelism."""


def dispatch(
    setting: Setting, x_TH: Tensor, choices_TK: Tensor, weights_TK: Tensor, experts: Experts
) -> Tensor:
    """[T, H]: for each token the weighted sum of its experts' outputs. A choice below 0 is not sent."""
    if setting.policy.dispatcher == "allgather" and setting.mesh.size("ep") > 1:
        return _by_all_gather(setting, x_TH, choices_TK, weights_TK, experts)
    return _by_exchange(setting, x_TH, choices_TK, weights_TK, experts)


def _by_exchange(
    setting: Setting, x_TH: Tensor, choices_TK: Tensor, weights_TK: Tensor, experts: Experts
) -> Tensor:
    num_experts, ep = setting.model.num_experts, setting.mesh.size("ep")
    group = setting.mesh.group("ep")
    order_N, counts_E = by_expert_order(choices_TK.flatten(), num_experts)
    received = exchange_counts(counts_E, group).view(ep, -1)
    sent = counts_E.view(ep, -1).sum(1)
    splits = torch.stack((sent, received.sum(1))).tolist() if ep > 1 else [[0], [0]]
    rows = copies_in_order(x_TH, order_N, choices_TK.shape[1])
    rows = exchange(rows, splits[1], splits[0], group)
    outputs = _at_experts(setting, rows, received, experts)
    outputs = exchange(outputs, splits[0], splits[1], group)
    return weighted_sum(outputs, weights_TK, order_N)


def _by_all_gather(
    setting: Setting, x_TH: Tensor, choices_TK: Tensor, weights_TK: Tensor, experts: Experts
) -> Tensor:
    """Every rank of ep sees all tokens and works on the copies that chose its experts."""
    group, local = setting.mesh.group("ep"), setting.model.num_experts // setting.mesh.size("ep")
    everyone = all_gather(choices_TK, group)
    weights = gather(weights_TK, group)
    x = gather(x_TH, group)
    first = setting.mesh.position("ep") * local
    mine = everyone - first
    mine = torch.where((mine >= 0) & (mine < local), mine, -1)
    order_N, counts_L = by_expert_order(mine.flatten(), local)
    rows = copies_in_order(x, order_N, choices_TK.shape[1])
    outputs = _at_experts(setting, rows, counts_L.view(1, -1), experts)
    return scatter_sum(weighted_sum(outputs, weights, order_N), group)


def by_expert_order(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Copies in the order of their experts, and how many each expert has; choices below 0 are left out."""
    keys = torch.where(choices < 0, num_experts, choices)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    order = keys.argsort(stable=True)
    return order[: int(counts.sum())], counts


def _at_experts(setting: Setting, rows: Tensor, counts_PL: Tensor, experts: Experts) -> Tensor:
    """Run the experts on rows that came from P ranks, each sender's sorted by local expert."""
    group = setting.mesh.group("etp")
    if group is None:
        return _sorted_run(rows, counts_PL, experts)
    return _over_tensor_ranks(rows, counts_PL, experts, group)


def _sorted_run(rows: Tensor, counts_PL: Tensor, experts: Experts) -> Tensor:
    senders, local = counts_PL.shape
    if senders == 1 or local == 1:
        return experts(rows, counts_PL.sum(0))
    order = owners_of_rows(counts_PL).argsort(stable=True)
    return restored(experts(reordered(rows, order), counts_PL.sum(0)), order)


def owners_of_rows(counts_PL: Tensor) -> Tensor:
    """The local expert of each row, where senders follow one another and each sorted its rows by expert."""
    senders, local = counts_PL.shape
    numbers = torch.arange(local, device=counts_PL.device).repeat(senders)
    return numbers.repeat_interleave(counts_PL.flatten())


def _over_tensor_ranks(rows: Tensor, counts_PL: Tensor, experts: Experts, group: Group) -> Tensor:
    """Ranks that share an expert gather one another's rows, padded to the most that one of them has, and
    scatter the partial sums back."""
    assert group is not None
    ranks = group.size()
    counts = all_gather(counts_PL.contiguous(), group).view(ranks, *counts_PL.shape)
    sizes = counts.sum((1, 2)).tolist()
    most, own = max(sizes), rows.shape[0]
    padded = gather(F.pad(rows, (0, 0, 0, most - own)), group)
    owners = [F.pad(owners_of_rows(counts[rank]), (0, most - sizes[rank]), value=-1) for rank in range(ranks)]
    order, by_expert = by_expert_order(torch.cat(owners), counts.shape[-1])
    outputs = experts(copies_in_order(padded, order, 1), by_expert)
    return scatter_sum(placed(outputs, order, padded.shape[0]), group)[:own]
