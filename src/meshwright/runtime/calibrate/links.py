"""Collectives between local ranks, each by the call with which the runtime makes it, and after some work.

In a step ranks come to a collective from their ops: not at the same moment, and with other data in their
caches. Back to back it takes half as long on two processors.
"""

from __future__ import annotations

import math
import statistics
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
WORK_S = 1e-3
"""Seconds of work before each, about what lies between two collectives of a small step."""


def timed_collective(
    kind: CollectiveKind, size: int, group: ProcessGroup, device: torch.device, work: Callable[[], object]
) -> Timed:
    """One collective of a payload in bytes, from the moment at which this rank comes to it after `work`; nan
    for a rank that has no partner to send to."""
    call = _call(kind, max(size // 4, 1), group, device)
    is_left_over = kind is CollectiveKind.SEND_RECV and group.rank() ^ 1 >= group.size()

    def sample() -> float:
        work()
        if is_left_over:
            return math.nan
        return seconds_of(call, device) / (2 if kind is CollectiveKind.SEND_RECV else 1)

    return sample


def usual_work(group: ProcessGroup, device: torch.device) -> Callable[[], object]:
    """Matmuls and sweeps over memory of about WORK_S, as many on every rank."""
    matrix, swept = torch.randn(256, 256, device=device), torch.zeros(1 << 20, device=device)

    def once() -> None:
        torch.mm(matrix, matrix)
        swept.add_(1.0)

    once()
    each = statistics.median(seconds_of(once, device) for _ in range(9))
    count = torch.tensor([max(round(WORK_S / each), 1)], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    times = int(count.item())

    def work() -> None:
        for _ in range(times):
            once()

    return work


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
            message = torch.zeros(elements, device=device)
            return lambda: _there_and_back(message, group)


def _there_and_back(buffer: Tensor, group: ProcessGroup) -> None:
    """A send between neighbours and its answer, as torch's pipelining makes them."""
    rank = group.rank()
    peer = rank ^ 1
    first, second = (dist.isend, dist.irecv) if rank < peer else (dist.irecv, dist.isend)
    for call in (first, second):
        for work in dist.batch_isend_irecv([dist.P2POp(call, buffer, group=group, group_peer=peer)]):
            work.wait()
