"""What ranks do while they train, counted, and what the graph says that they do.

Experts are chosen evenly here, because the graph describes balanced routing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from layouts import Case, _case
from ranks import run_ranks
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import made_once, stream_of, trainer_of

from meshwright.ir.program import Program, lower
from meshwright.ir.sharding import local_shape
from meshwright.layout import GROUP_AXES, REPLICA_AXES
from meshwright.plan import Plan
from meshwright.runtime.calls import call_of
from meshwright.runtime.step import inputs_of, rows_of_rank

_CHOSEN = (
    _case("gated", "dp2", "z0"),
    _case("gated", "dp2 ep2", "z1", "selective"),
    _case("gated", "dp4 ep2", "z3", "mb2"),
    _case("gated", "dp4 ep2", "z3", "bf16", "full"),
    _case("gated", "dp2 ep2", "z2", "fp16", "allgather"),
    _case("uneven", "dp4 ep2 etp2", "z1", "mb2"),
    _case("gated", "dp4 ep2 dp_replicas2", "z1", "mb2"),
    _case("gated", "dp4 ep2 dp_replicas2", "z3", "mb2"),
    _case("tied", "pp2 dp4 ep2 dp_replicas2", "z3", "1F1B"),
    _case("dense", "tp2 dp2", "z1", "mb4", "nosp"),
    _case("dense", "tp4", "z1", "mb8", "nosp"),
    _case("dense", "tp2 dp2", "z3", "mb4", "nosp"),
    _case("gated", "tp2 dp2 ep4", "z1", "mb4", "full"),
    _case("plain", "tp2 dp2 ep2 etp2", "z2", "mb4"),
    _case("plain", "tp2 dp2 ep2 etp2", "z1", "mb4", "allgather", "fp16"),
    _case("plain", "tp2 dp4 ep2 etp2", "z3", "mb2"),
    _case("tied", "tp4 ep2 etp2", "z1", "mb8"),
    _case("tied", "pp2 dp2 ep2", "z1", "GPipe"),
    _case("tied", "pp2 dp2 ep2", "z3", "1F1B", "fp16"),
    _case("tied", "pp2 dp2 ep2 vpp2", "z2", "ZBVZeroBubble"),
    _case("balanced", "tp2 dp2 ep4", "z1", "mb4", "selective"),
    _case("balanced", "tp2 pp2 ep2", "z1", "mb4", "1F1B", "full"),
    _case("balanced", "pp2 dp2 ep2 vpp2", "z1", "ZBVZeroBubble", "full"),
    _case("sigmoid", "tp2 dp2 ep2", "z1", "mb4"),
    _case("gated", "pp2 dp4 ep2 vpp2", "z3", "Interleaved1F1B", "fp16"),
    _case("gated", "pp2 dp2 ep2 vpp2", "z1", "InterleavedZeroBubble", "selective"),
    _case("gated", "tp2 pp2 dp2 ep2 vpp2", "z1", "DualPipeV"),
    _case("gated", "pp4 dp2 ep2", "z1", "1F1B"),
)

CASES = tuple(replace(case, vocabulary=256) if case.policy["zero_stage"] == 3 else case for case in _CHOSEN)
"""FSDP2 pads the rows of what it divides to a multiple of the ranks. The graph does not: where ZeRO 3 is on,
all rows divide."""

Calls = Counter[tuple[str, str, int, int]]
"""How often each kind of collective ran: kind, axis, ranks, bytes."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Done:
    """What one rank did in its second step, what it holds, and whom it speaks to by axis."""

    pp_rank: int
    calls: Calls
    shapes: Shapes
    elements: dict[str, int]
    groups: dict[str, list[int]]


class _Watch(TorchDispatchMode):
    """Counts the collectives that run while it is active."""

    def __init__(self, groups: Mapping[str, ProcessGroup]) -> None:
        super().__init__()
        self.axis_of = {group.group_name: axis for axis, group in groups.items()}
        self.calls: Calls = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            call, group = call_of(func, args, self.axis_of)
            if not call.is_receive:
                axis = "tp" if call.axis == "kv_copies" else call.axis  # the graph's name for them
                self.calls[call.kind.value, axis, group.size(), call.bytes] += 1
        return func(*args, **(kwargs or {}))


@cache
def done(case: Case, folder: Path) -> list[Done]:
    """What every rank of a case did."""
    plan = case.plan("adamw")
    return made_once(folder / f"done-{plan.digest}", lambda: run_ranks(case.world, _done, plan, folder))


def _done(rank: int, plan: Plan, folder: Path) -> Done:
    trainer = trainer_of(plan, rank, by_place=False, routes_evenly=True)
    stream, rows = stream_of(plan, folder), rows_of_rank(plan, trainer.mesh)
    batches = [inputs_of(stream.next(rows), trainer.mesh.device) for _ in range(2)]
    trainer.step(*batches[0])
    with _Watch(trainer.mesh.groups) as watch:
        trainer.step(*batches[1])
    tensors = {n: p for stage in trainer.replica.stages.values() for n, p in stage.named_parameters()}
    return Done(
        trainer.mesh.position("pp"),
        watch.calls,
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {n: (t.to_local() if isinstance(t, DTensor) else t).numel() for n, t in tensors.items()},
        {axis: dist.get_process_group_ranks(group) for axis, group in trainer.mesh.groups.items()},
    )


def said_calls(program: Program, pp_rank: int) -> Calls:
    """The collectives of a step on a pipeline rank, by the graph."""
    calls: Calls = Counter()
    for task, count in program.collectives(pp_rank):
        calls[task.kind.value, task.axis, task.num_ranks, task.bytes] += count
    return calls


def said_shapes(program: Program, pp_rank: int) -> Shapes:
    """The parameters of a pipeline rank and their shapes before ZeRO, by the graph."""
    layout = program.plan.layout
    stages = program.stages_of(pp_rank)
    return {param.name: local_shape(param, layout) for stage in stages for param in stage.params}


def said_groups(plan: Plan, rank: int) -> dict[str, list[int]]:
    """Whom a rank speaks to, by the layout."""
    layout = plan.layout
    groups = {axis: layout.group_of(rank, axis, view) for axis, view in GROUP_AXES if layout.size(axis) > 1}
    groups["world"] = list(range(layout.world_size))
    if layout.dp_replicas > 1:
        more = {axis: layout.group_of(rank, axis, view) for axis, view in REPLICA_AXES}
        groups |= {axis: ranks for axis, ranks in more.items() if len(ranks) > 1}
    if layout.pp > 1 and rank in (ends := [groups["pp"][0], groups["pp"][-1]]):
        groups["embedding"] = ends
    if layout.tp > (heads := plan.model.kv_heads):
        copies, peers = layout.tp // heads, groups["tp"]
        first = peers.index(rank) // copies * copies
        groups["kv_copies"] = peers[first : first + copies]
    return groups


def differences(case: Case, found: list[Done]) -> list[str]:
    """Where ranks did other than the graph says, in words."""
    program = lower(case.plan("adamw"))
    wrong = []
    for rank, one in enumerate(found):
        said, did = said_calls(program, one.pp_rank), one.calls
        for what, more in (("missing", said - did), ("surplus", did - said)):
            wrong += [f"rank {rank}: {what} {count} × {call}" for call, count in sorted(more.items())]
    return wrong


def stem(name: str) -> str:
    """A name without the number of its layer or stage."""
    return re.sub(r"^(layers|stages)\.\d+\.", "", name)


def stems() -> dict[str, Case]:
    """Every collective that occurs in the cases, by its stem, with the first case that has it."""
    found: dict[str, Case] = {}
    for case in CASES:
        program = lower(case.plan("adamw"))
        for pp_rank in range(program.plan.layout.pp):
            for task, _ in program.collectives(pp_rank):
                found.setdefault(stem(task.name), case)
    return found
