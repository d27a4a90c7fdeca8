"""One rank of any world in one process, with real tensors: it computes as it would among the others, and what
it would receive is made up on the spot.

The process group sends nothing. What comes back of a collective is this rank's own, in the sizes that the
others would send; row counts are those of even routing (`runtime/dryrun/routes.py`), so that buffers fit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.ir.graph import CollectiveKind
from meshwright.ir.observed import Call
from meshwright.plan import Plan
from meshwright.runtime.calls import call_of
from meshwright.runtime.dryrun.routes import Even
from meshwright.runtime.dryrun.world import rank_of
from meshwright.runtime.mesh import Mesh


@contextmanager
def alone(plan: Plan, rank: int, device: torch.device) -> Iterator[Alone]:
    """This process as a rank of a plan, its collectives answered by itself while this is active."""
    with rank_of(plan, rank, device) as mesh, Alone(plan, mesh) as answering:
        yield answering


class Alone(TorchDispatchMode):
    """Answers collectives, and adds up how long that takes: no share of what a rank computes."""

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.routes = mesh, Even(plan)
        self.axis_of: dict[str, str] = {group.group_name: axis for axis, group in mesh.groups.items()}
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def taken(self) -> float:
        """Seconds of collectives since this was asked last; on a GPU those of the device, which is waited
        for."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        of_device = sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        seconds, self._seconds, self._events = self._seconds + of_device, 0.0, []
        return seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        if self.mesh.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = self._answered(func, args, kwargs or {})
            end.record()
            self._events.append((start, end))
            return out
        began = time.perf_counter()
        out = self._answered(func, args, kwargs or {})
        self._seconds += time.perf_counter() - began
        return out

    def _answered(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call, group = call_of(func, args, self.axis_of)
        out = func(*args, **kwargs)
        with torch.no_grad():
            self._fill(call, args, group.rank(), group.size())
        return out

    def _fill(self, call: Call, args: Any, place: int, num_ranks: int) -> None:
        match call.kind:
            case CollectiveKind.ALL_GATHER:
                self._gather(call.axis, args[0], args[1], num_ranks)
            case CollectiveKind.REDUCE_SCATTER:
                _repeat(args[0], args[1])
            case CollectiveKind.ALL_TO_ALL if not args[0].is_floating_point():
                args[0].copy_(self._counts(args[1], place, num_ranks).view_as(args[0]))
            case CollectiveKind.ALL_TO_ALL:
                _repeat(args[0], args[1])
            case CollectiveKind.SEND_RECV if call.is_receive:
                (message,) = args[0]
                # Whole numbers are votes that torch's pipelining takes before its first step: yes.
                message.normal_() if message.is_floating_point() else message.fill_(1)

    def _gather(self, axis: str, out: Tensor, own: Tensor, num_ranks: int) -> None:
        if own.is_floating_point() or axis != "ep" or own.dim() != 2:
            _repeat(out, own)
            return
        everyone = [self.routes.choices_of(own, place) for place in range(num_ranks)]
        out.copy_(torch.cat(everyone).view_as(out))

    def _counts(self, own: Tensor, place: int, num_ranks: int) -> Tensor:
        """Of every rank along ep, how many copies come for this rank's experts."""
        local = own.numel() // num_ranks
        mine = slice(place * local, (place + 1) * local)
        flat = own.flatten()
        return torch.cat([self.routes.counts_of(flat, one)[mine] for one in range(num_ranks)])


def _repeat(out: Tensor, own: Tensor) -> None:
    """Fill a tensor with what this rank sends, as often as it takes."""
    target, source = out.view(-1), own.reshape(-1)
    if not source.numel():
        target.zero_()
        return
    for start in range(0, target.numel(), source.numel()):
        part = target[start : start + source.numel()]
        part.copy_(source[: part.numel()])
