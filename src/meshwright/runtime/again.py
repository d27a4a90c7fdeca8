"""Full recompute: a layer keeps its input and its routing decisions, and is run again when backward needs it.

It runs again once for each micro-batch, however backward is split: what it makes stays until autograd lets go
of it. torch.utils.checkpoint would run it again for every call of autograd.grad, and a zero-bubble schedule
makes one for each group of parameters (docs/decisions/0014-own-recompute.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from meshwright.runtime.tape import Tape, recording, replaying

Run = Callable[..., Tensor]


def run_again(run: Run, x: Tensor, *rest: Any) -> Tensor:
    """run(x, *rest), of which only x, `rest` and the routing decisions are kept for backward."""
    if not torch.is_grad_enabled():
        return run(x, *rest)
    region = _Region(run, x, rest)
    with saved_tensors_hooks(region.pack, _unpack), recording(region.tape):
        return run(x, *rest)


class _Handle:
    """Stands in the graph for a saved tensor; when autograd drops it, so does the region."""

    def __init__(self, region: _Region, place: int) -> None:
        self.region, self.place = region, place

    def __del__(self) -> None:
        self.region.made.pop(self.place, None)


class _Region:
    """One run of a layer. `made` holds saved tensors of its second run by their place in the order."""

    def __init__(self, run: Run, x: Tensor, rest: tuple[Any, ...]) -> None:
        self.run, self.rest = run, rest
        self.x, self.needs_gradient = x.detach(), x.requires_grad
        self.tape = Tape()
        self.num_saved = 0
        self.made: dict[int, Tensor] = {}

    def pack(self, _: Tensor) -> _Handle:
        """A place for a saved tensor; the tensor itself is let go."""
        handle = _Handle(self, self.num_saved)
        self.num_saved += 1
        return handle

    def tensor(self, place: int) -> Tensor:
        """The saved tensor of a place; runs the layer again where it is not there."""
        if place not in self.made:
            self._run_again()
        return self.made[place]

    def _run_again(self) -> None:
        made: list[Tensor] = []

        def keep(tensor: Tensor) -> int:
            made.append(tensor.detach())
            return len(made) - 1

        x = self.x.requires_grad_(self.needs_gradient)
        with torch.enable_grad(), saved_tensors_hooks(keep, made.__getitem__), replaying(self.tape):
            self.run(x, *self.rest)
        if len(made) != self.num_saved:
            raise RuntimeError(f"a layer saved {self.num_saved} tensors, and {len(made)} when run again")
        self.made = dict(enumerate(made))


def _unpack(handle: _Handle) -> Tensor:
    return handle.region.tensor(handle.place)
