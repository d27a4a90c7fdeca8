"""Collectives between local ranks, each by the call with which the runtime makes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from meshwright.ir.graph import CollectiveKind
from meshwright.runtime.calibrate.rounds import Timed, seconds_of
from meshwright.runtime.collectives import all_gather, all_reduce, exchange_counts, reduce_scatter

PAYLOADS = (4, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of the payloads that are timed, as CollectiveKind counts them."""


def timed_collective(kind: CollectiveKind, size: int, group: ProcessGroup, device: torch.device) -> Timed:
    """One collective of a payload in bytes. Ranks meet before it, so that none waits for another's work."""
    call = _call(kind, max(size // 4, 1), group, device)
    meeting = torch.zeros(1, device=device)

    def sample() -> float:
        dist.all_reduce(meeting, group=group)
        return seconds_of(call, device) / (2 if kind is CollectiveKind.SEND_RECV else 1)

    return sample


def _call(
    kind: CollectiveKind, elements: int, group: ProcessGroup, device: torch.device
) -> Callable[[], object]:
    ranks = group.size()
    share = max(elements // ranks, 1)
    whole, part = torch.zeros(share * ranks, device=device), torch.zeros(share, device=device)
    match kind:
        case CollectiveKind.ALL_REDUCE:
            buffer = torch.zeros(elements, device=device)
            return lambda: all_reduce(buffer, group)
        case CollectiveKind.ALL_GATHER:
            return lambda: all_gather(part, group)
        case CollectiveKind.REDUCE_SCATTER:
            return lambda: reduce_scatter(whole, group)
        case CollectiveKind.ALL_TO_ALL:
            return lambda: exchange_counts(whole, group)
        case CollectiveKind.SEND_RECV:
            return lambda: _there_and_back(torch.zeros(elements, device=device), group)


def _there_and_back(buffer: Tensor, group: ProcessGroup) -> None:
    """A send between neighbours and its answer, as torch's pipelining makes them."""
    rank = group.rank()
    peer = rank ^ 1
    if peer >= group.size():
        return
    first, second = (dist.isend, dist.irecv) if rank < peer else (dist.irecv, dist.isend)
    for call in (first, second):
        for work in dist.batch_isend_irecv([dist.P2POp(call, buffer, group=group, group_peer=peer)]):
            work.wait()
