"""ZeRO 0, 1 and 2: weights and gradients in one flat buffer per data axis, each reduced in one call.

Gradients add up in FP32 over the micro-batches of a step; then they are all-reduced (ZeRO 0), or
reduce-scattered, the rank's share updated, and the weights gathered again (Rajbhandari et al.,
arXiv:1910.02054 §5 and §7). Between two reductions ZeRO 1 and 2 are the same here: gradients are whole until
the step's one reduction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.ir.sharding import replica_axis
from meshwright.runtime.collectives import all_gather_single, reduce_scatter_single
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.shares import Held, Partial, Share, add_up_runs, end_to_end


class Bucket:
    """The parameters that one data axis reduces, end to end in one buffer.

    Those whose gradients are partial sums over another axis stand first and side by side, so that each such
    sum is one call.
    """

    def __init__(
        self,
        axis: str,
        held: Sequence[Held],
        mesh: Mesh,
        kind: torch.dtype,
        divided: bool,
        partial: Partial,
    ) -> None:
        self.axis, self.mesh = axis, mesh
        self.group = mesh.group(axis)
        self.replicas = mesh.group(replica_axis(axis)) if divided else None
        self.divided = divided and self.group is not None
        self.members, self.partial_runs = end_to_end(held, partial, lambda one: one.tensor.numel())
        self._allocate(kind)
        self.shares = list(self._shares())

    def _allocate(self, kind: torch.dtype) -> None:
        """Weights of the compute type and FP32 gradients; parameters become views of them. The buffer ends at
        a multiple of the ranks that divide it. Masters start from the parameters as they are, in FP32."""
        ranks = self.mesh.size(self.axis) if self.divided else 1
        size = -(-max((m.stop for m in self.members), default=0) // ranks) * ranks
        device = self.mesh.device
        full = torch.zeros(size, dtype=torch.float32, device=device)
        self.weights = full if kind == torch.float32 else torch.zeros(size, dtype=kind, device=device)
        self.gradients = torch.zeros(size, dtype=torch.float32, device=device)
        self.places: list[Tensor] = []
        for member in self.members:
            tensor, place = member.held.tensor, slice(member.start, member.stop)
            full[place] = tensor.detach().flatten()
            tensor.data = self.weights[place].view(tensor.shape)
            tensor.grad_dtype = torch.float32
            tensor.grad = self.gradients[place].view(tensor.shape)
            self.places.append(tensor.grad)
        width = size // ranks
        self.start = self.mesh.position(self.axis) * width if self.divided else 0
        self.stop = self.start + width
        own = full[self.start : self.stop]
        self.masters = own if kind == torch.float32 else own.clone()
        self.own_gradients = torch.zeros_like(self.masters) if self.divided else self.gradients
        self.weights.copy_(full)

    def _shares(self) -> Iterator[Share]:
        for member in self.members:
            first, last = max(member.start, self.start), min(member.stop, self.stop)
            if first < last:
                own = slice(first - self.start, last - self.start)
                yield Share(
                    member.held,
                    first - member.start,
                    last - member.start,
                    self.masters[own],
                    self.own_gradients[own],
                )

    def add_partial_sums(self) -> None:
        """Add up what the ranks of tp, or of etp, each hold a part of."""
        add_up_runs(self.gradients, self.partial_runs, self.mesh)

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradients.zero_()
        for member, place in zip(self.members, self.places, strict=True):
            member.held.tensor.grad = place

    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient of a parameter, if it is here."""
        return next((m.held.tensor.grad for m in self.members if m.held.name == name), None)

    def collect(self) -> None:
        """Gradients add up in the buffer, unless somebody has taken a parameter's view of it away: torch's
        pipelining clears gradients of modules with FSDP2 parts before its first step."""
        for member, place in zip(self.members, self.places, strict=True):
            grad = member.held.tensor.grad
            if grad is None or not _is_same(grad, place):
                place.zero_() if grad is None else place.copy_(grad)
                member.held.tensor.grad = place

    def reduce(self) -> None:
        """Add up over the data axis, then over the replicas of what ZeRO divides."""
        if self.divided:
            reduce_scatter_single(self.own_gradients, self.gradients, group=self.group)
        elif self.group is not None:
            dist.all_reduce(self.gradients, group=self.group)
        if self.replicas is not None:
            dist.all_reduce(self.own_gradients, group=self.replicas)

    def publish(self) -> None:
        """Masters to weights, on every rank of the data axis."""
        own = self.weights[self.start : self.stop]
        if self.masters.dtype != own.dtype:
            own.copy_(self.masters)
        if self.divided:
            all_gather_single(self.weights, own, group=self.group)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a size start at the same element of the same storage."""
    if one is other:
        return True
    storages = one.untyped_storage()._cdata, other.untyped_storage()._cdata
    return storages[0] == storages[1] and one.storage_offset() == other.storage_offset()
