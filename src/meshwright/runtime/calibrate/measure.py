"""A calibration's measurements on local ranks: all of them do the same at once, as in training."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshwright.ir.graph import CollectiveKind
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.runtime.calibrate.links import PAYLOADS, timed_collective, usual_work
from meshwright.runtime.calibrate.rounds import (
    Sampled,
    Timed,
    averaged,
    clock_of,
    in_turns,
    seconds_of,
    summed_up,
)
from meshwright.runtime.calibrate.subjects import Shape, Subject, Surroundings, subject_of
from meshwright.runtime.launch import DeviceKind, device_kind, run_local
from meshwright.runtime.mesh import Mesh, single_process
from meshwright.runtime.pipeline import COMPUTE_TYPES
from meshwright.runtime.step import Trainer

OPS, STEPS, LINKS = 0.5, 0.3, 0.2
"""Shares of the time for ops, small steps and collectives, of a calibration of several ranks."""


@dataclass(frozen=True)
class Job:
    """What is measured at once on some ranks.

    `launching`: a plan of as many ranks, which says who meets. `model` is what ops stand in; `references` are
    plans of one rank whose whole steps are timed.
    """

    launching: Plan
    model: Model
    shapes: tuple[Shape, ...]
    references: tuple[Plan, ...]
    budget_s: float


@dataclass(frozen=True)
class Measured:
    """What was measured: seconds of each shape, of a step of each reference, of each collective and payload,
    and the conditions: threads of a rank, and the device with its name."""

    shapes: Mapping[Shape, Sampled]
    references: tuple[Sampled, ...]
    links: Mapping[tuple[str, int], Sampled]
    threads: int
    gpu: str | None
    wall_s: float


def measure_locally(job: Job, device: DeviceKind) -> Measured:
    """Measure on the ranks of the job's plan, on this machine. Raises MeshwrightError."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        path = Path(folder) / "measured.json"
        world = job.launching.layout.world_size
        run_local(job.launching, world, device, lambda mesh: _rank(job, mesh, path))
        return _read(job, json.loads(path.read_text("utf-8")))


def _read(job: Job, found: dict[str, Any]) -> Measured:
    return Measured(
        {shape: Sampled(*values) for shape, values in zip(job.shapes, found["shapes"], strict=True)},
        tuple(Sampled(*values) for values in found["references"]),
        {(kind, size): Sampled(*values) for kind, size, values in found["links"]},
        found["threads"],
        found["gpu"],
        found["wall_s"],
    )


def _rank(job: Job, mesh: Mesh, path: Path) -> None:
    """One rank's part; the first one writes what all have measured."""
    began = time.perf_counter()
    together = mesh.layout.world_size > 1
    share = job.budget_s if together else job.budget_s / (OPS + STEPS)
    goes_on = partial(_agreed, mesh)
    shapes = _shapes(job, mesh, OPS * share, goes_on)
    steps = in_turns([_timed_step(plan, mesh) for plan in job.references], STEPS * share, goes_on)
    links = _links(mesh, LINKS * share, goes_on) if together else []
    means = [summed_up(_over_ranks(mesh, seconds)) for seconds in (*shapes, *steps)]
    if mesh.rank == 0:
        document = {
            "shapes": [astuple(one) for one in means[: len(shapes)]],
            "references": [astuple(one) for one in means[len(shapes) :]],
            "links": [(kind, size, astuple(one)) for kind, size, one in links],
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else None,
            "wall_s": time.perf_counter() - began,
        }
        path.write_text(json.dumps(document), "utf-8")


def _agreed(mesh: Mesh, wanted: bool) -> bool:
    """Whether the first rank wants another round: all do as it does, and start together."""
    group = mesh.group("world")
    if group is None:
        return wanted
    flag = torch.tensor([int(wanted and mesh.rank == 0)], device=mesh.device)
    dist.all_reduce(flag, group=group)
    return bool(flag.item())


def _over_ranks(mesh: Mesh, seconds: Sequence[float]) -> list[float]:
    """The mean of each sample over the ranks that took part."""
    if mesh.group("world") is None:
        return list(seconds)
    everyone: list[list[float]] = [[] for _ in range(mesh.layout.world_size)]
    group = mesh.group("coordination") or mesh.group("world")
    dist.all_gather_object(everyone, list(seconds), group=group)
    took_part = ([one for one in values if not math.isnan(one)] for values in zip(*everyone, strict=True))
    return [statistics.fmean(values) for values in took_part]


def _shapes(job: Job, mesh: Mesh, budget_s: float, goes_on: Callable[[bool], bool]) -> list[list[float]]:
    """Samples of every op and phase, without what it costs to enter autograd: a step does that once."""
    kind = COMPUTE_TYPES[job.launching.workload.precision]
    here = Surroundings(job.model, kind, mesh.device, job.launching.workload.optimizer)
    subjects: dict[tuple[str, tuple[int, ...]], Subject] = {}
    timed: list[Timed] = []
    for shape in job.shapes:
        key = (shape.op, shape.sizes)
        if key not in subjects:
            subjects[key] = subject_of(shape, here)
        timed.append(_timed_phase(subjects[key], shape.phase, mesh))
    nothing = torch.zeros(1, device=mesh.device, requires_grad=True)
    entering = Subject(lambda: nothing.view_as(nothing), [nothing])
    *found, empty = in_turns([*timed, _timed_phase(entering, "input_gradient", mesh)], budget_s, goes_on)
    entry_s = summed_up(empty).time_s
    least = 1e-7

    def enters(shape: Shape) -> bool:
        return shape.phase.endswith("gradient") and subjects[shape.op, shape.sizes].update is None

    return [
        [max(one - entry_s, least) for one in seconds] if enters(shape) else seconds
        for shape, seconds in zip(job.shapes, found, strict=True)
    ]


def _timed_phase(subject: Subject, phase: str, mesh: Mesh) -> Timed:
    clock = clock_of(mesh.device, mesh.layout.world_size)

    def sample() -> float:
        seconds = seconds_of(subject.prepared(phase), mesh.device, clock)
        subject.settle()
        return seconds

    return sample


def _timed_step(plan: Plan, mesh: Mesh) -> Timed:
    """A whole training step of a small plan of one rank, which each rank runs on its own."""
    trainer = Trainer(plan, single_process(mesh.device))
    count, length = plan.sequences_per_replica, plan.workload.max_sequence_length
    tokens = torch.randint(0, plan.model.vocab_size, (count, length), device=mesh.device)

    clock = clock_of(mesh.device, mesh.layout.world_size)

    def sample() -> float:
        began = clock()
        trainer.step(tokens, tokens)
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        return clock() - began

    return sample


def _links(mesh: Mesh, budget_s: float, goes_on: Callable[[bool], bool]) -> list[tuple[str, int, Sampled]]:
    """Collectives among all ranks. The mean over ranks counts, of the time from each rank's coming to its
    going: work is priced by what it takes in the mean, and here it is that others wait for the slowest."""
    group = mesh.group("world")
    assert group is not None
    asked = [(kind, size) for kind in CollectiveKind for size in PAYLOADS]
    work = usual_work(group, mesh.device)
    timed = [timed_collective(kind, size, group, mesh.device, work) for kind, size in asked]
    samples = in_turns(timed, budget_s, goes_on)
    return [
        (kind.value, size, averaged(_over_ranks(mesh, seconds)))
        for (kind, size), seconds in zip(asked, samples, strict=True)
    ]


__all__ = ["Job", "Measured", "device_kind", "measure_locally"]
