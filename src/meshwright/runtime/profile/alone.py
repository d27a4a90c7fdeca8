"""One rank of any world in one process, with real tensors: it computes as it would among the others, and what
it would receive is made up on the spot.

The process group sends nothing. What comes back of a collective is this rank's own, in the sizes that the
others would send; row counts are those of even routing (`runtime/dryrun/routes.py`), so that buffers fit.
This is done at the functions of `torch.distributed`: an op that is no collective runs as it always does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from meshwright.ir.graph import CollectiveKind
from meshwright.plan import Plan
from meshwright.runtime.dryrun.routes import Even
from meshwright.runtime.dryrun.world import rank_of
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.profile.labels import CALLS, axis_of, replaced, sends_of, tensors_of


@contextmanager
def alone(plan: Plan, rank: int, device: torch.device) -> Iterator[Alone]:
    """This process as a rank of a plan, its collectives answered by itself while this is active."""
    with rank_of(plan, rank, device) as mesh, ExitStack() as stack:
        answering = Alone(plan, mesh)
        for name, (kind, _) in CALLS.items():
            if hasattr(dist, name):
                stack.enter_context(replaced(dist, name, partial(answering.answered, kind)))
        stack.enter_context(replaced(*sends_of(), answering.answered_batch))
        stack.enter_context(replaced(dist, "recv", answering.answered_vote))
        yield answering


class Alone:
    """Answers collectives, and adds up how long that takes: no share of what a rank computes.

    What runs beside compute, as FSDP2's gathers on their own stream of a GPU do, is not added.
    """

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        self.mesh, self.routes = mesh, Even(plan)
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def taken(self) -> float:
        """Seconds of answers since this was asked last; on a GPU those of the device, which is waited for."""
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        of_device = sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        seconds, self._seconds, self._events = self._seconds + of_device, 0.0, []
        return seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if self.mesh.device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def answered(self, kind: CollectiveKind, call: Any) -> Any:
        """A collective whose result is filled in."""

        def answered(*args: Any, **kwargs: Any) -> Any:
            with self._timed(), torch.no_grad():
                work = call(*args, **kwargs)
                if kind is not CollectiveKind.ALL_REDUCE:
                    out, own = tensors_of(args, kwargs)[:2]
                    self._fill(kind, out, own, kwargs["group"])
                return work

        return answered

    def answered_batch(self, call: Any) -> Any:
        """Sends and receives of a pipeline; what is received is drawn."""

        def answered(ops: list[Any], *args: Any, **kwargs: Any) -> Any:
            with self._timed(), torch.no_grad():
                works = call(ops, *args, **kwargs)
                for op in ops:
                    if op.op is dist.irecv:
                        with record_function(f"collective:{axis_of(op.group)} recv 0"):
                            op.tensor.normal_()
                return works

        return answered

    def answered_vote(self, call: Any) -> Any:
        """Whole numbers that torch's pipelining asks for before its first step: yes."""

        def answered(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            source = call(tensor, *args, **kwargs)
            tensor.fill_(1)
            return source

        return answered

    def _fill(self, kind: CollectiveKind, out: Tensor, own: Tensor, group: Any) -> None:
        place, num_ranks, axis = group.rank(), group.size(), axis_of(group)
        whole = not own.is_floating_point()
        if whole and kind is CollectiveKind.ALL_TO_ALL:
            out.copy_(self._counts(own, place, num_ranks).view_as(out))
        elif whole and kind is CollectiveKind.ALL_GATHER and axis == "ep" and own.dim() == 2:
            everyone = [self.routes.choices_of(own, one) for one in range(num_ranks)]
            out.copy_(torch.cat(everyone).view_as(out))
        else:
            _repeat(out, own)

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
