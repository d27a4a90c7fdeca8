"""One process as a rank of any world: a fake process group, which sends nothing and waits for nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from meshwright.plan import Plan
from meshwright.runtime.mesh import Mesh, build_mesh, single_process

_NUMBERS = count()


class RealNumbersMesh(Mesh):
    """A mesh whose ranks are real numbers where tensors are fake."""

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """As `Mesh.device_mesh`, and unlike any other of this process: PyTorch keeps what it worked out for
        equal meshes, with the groups of the world that came first."""
        with _disable_current_modes():
            made = super().device_mesh(*axes)
        made._thread_id, made._hash = next(_NUMBERS), None
        return made


@contextmanager
def rank_of(plan: Plan, rank: int, device: torch.device | None = None) -> Iterator[Mesh]:
    """This process as a rank of a plan's world, with the groups that training would make; on a processor
    unless a device is given."""
    device = device or torch.device("cpu")
    if plan.layout.world_size == 1:
        yield single_process(device)
        return
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.layout.world_size)
    try:
        mesh = build_mesh(plan.layout, rank, device, plan.model.kv_heads)
        yield RealNumbersMesh(mesh.layout, mesh.rank, mesh.device, mesh.groups)
    finally:
        dist.destroy_process_group()
