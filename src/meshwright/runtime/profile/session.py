"""A profile of a plan: a few steps for the memory, some as they are for the time, some under the profiler."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from meshwright.deployment import Training
from meshwright.plan import Plan
from meshwright.runtime.data import DataStream, open_stream
from meshwright.runtime.launch import DeviceKind, run_alone, run_joined, run_local
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.profile.alone import alone
from meshwright.runtime.profile.labels import labelled_collectives, labelled_method, labelled_modules
from meshwright.runtime.profile.living import Living
from meshwright.runtime.step import Trainer, inputs_of, rows_of_rank
from meshwright.torchrun import is_under_torchrun

WARMING = 2
MOST_PROFILED = 5
"""Steps under the profiler, at most: each is some thousand events a layer."""


@dataclass(frozen=True)
class Session:
    """How a profile goes. `folder`: where data are looked up; `traces`: where each rank leaves its trace;
    `steps`: how many are timed; `routes_evenly`: balanced choices in the place of the router's; `alone`: the
    one rank that runs, in this process, without the others."""

    folder: Path
    traces: Path
    steps: int
    routes_evenly: bool = False
    alone: int | None = None


@dataclass(frozen=True)
class Profiled:
    """What one rank measured. `step_s`: seconds of each step without the profiler; `trace`: its file;
    `peak_bytes`: of living tensors, or of what a GPU's allocator gave; `answered_s`: of a rank alone, what
    the answers to its collectives took of each step, 0 of others."""

    rank: int
    step_s: tuple[float, ...]
    profiled_s: tuple[float, ...]
    peak_bytes: int
    gpu: str | None
    trace: Path
    answered_s: tuple[float, ...]


def profile_plan(plan: Plan, session: Session, device: DeviceKind) -> list[Profiled]:
    """Profile a plan on local ranks, or as one of torchrun's. Raises InputError and MeshwrightError."""
    training = plan.training or Training()
    stream = open_stream(training, plan.workload, plan.model.vocab_size, session.folder)

    def work(mesh: Mesh) -> None:
        _rank(plan, mesh, stream, session)

    rank = session.alone
    if rank is not None:
        run_alone(device, lambda on: _alone(plan, rank, on, stream, session))
    elif is_under_torchrun():
        run_joined(plan, device, work)
    else:
        run_local(plan, plan.layout.world_size, device, work)
    return [_read(path) for path in sorted(session.traces.glob("rank*.profile.json"))]


def _read(path: Path) -> Profiled:
    found = json.loads(path.read_text("utf-8"))
    trace = path.with_name(found["trace"])
    times = (tuple(found["step_s"]), tuple(found["profiled_s"]))
    answered = tuple(found["answered_s"])
    return Profiled(found["rank"], *times, found["peak_bytes"], found["gpu"], trace, answered)


def _alone(plan: Plan, rank: int, device: torch.device, stream: DataStream, session: Session) -> None:
    with alone(plan, rank, device) as answering:
        _rank(plan, answering.mesh, stream, session, answering.taken)


def _rank(
    plan: Plan,
    mesh: Mesh,
    stream: DataStream,
    session: Session,
    answered_since: Callable[[], float] = lambda: 0.0,
) -> None:
    """Profile one rank. `answered_since`: seconds of answered collectives since it was asked last."""
    rows = rows_of_rank(plan, mesh)
    with ExitStack() as stack:
        living = None if mesh.device.type == "cuda" else stack.enter_context(Living())
        if living is not None:
            stack.enter_context(living.storages.watching_resizes())
        trainer = Trainer(plan, mesh, routes_evenly=session.routes_evenly)
        step = _stepping(trainer, stream, rows)
        peak = _peak(step, living, mesh)
    for _ in range(WARMING):
        step()
    seconds, answered = [], []
    for _ in range(session.steps):
        answered_since()
        seconds.append(step())
        answered.append(answered_since())
    trace = session.traces / f"rank{mesh.rank}.trace.json"
    profiled = _profiled(trainer, step, min(session.steps, MOST_PROFILED), trace)
    document: dict[str, Any] = {
        "rank": mesh.rank,
        "step_s": seconds,
        "profiled_s": profiled,
        "peak_bytes": peak,
        "gpu": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else None,
        "trace": trace.name,
        "answered_s": answered,
    }
    path = session.traces / f"rank{mesh.rank}.profile.json"
    path.write_text(json.dumps(document), "utf-8")
    if is_under_torchrun() and session.alone is None:
        _hand_over(mesh, session.traces)


def _hand_over(mesh: Mesh, traces: Path) -> None:
    """Every rank's files to the first rank, which has a folder of its own, maybe on another node."""
    group = mesh.group("coordination") or mesh.group("world")
    if group is None:
        return
    own = {path.name: zlib.compress(path.read_bytes(), 1) for path in traces.iterdir()}
    everyone: list[Any] | None = [None] * mesh.layout.world_size if mesh.rank == 0 else None
    dist.gather_object(own, everyone, dst=0, group=group)
    for files in everyone or ():
        for name, packed in files.items():
            (traces / name).write_bytes(zlib.decompress(packed))


def _stepping(trainer: Trainer, stream: DataStream, rows: range) -> Callable[[], float]:
    """One step with its batch, as the training loop takes it; returns its seconds."""
    device = trainer.mesh.device

    def step() -> float:
        began = time.perf_counter()
        trainer.step(*inputs_of(stream.next(rows), device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    return step


def _peak(step: Callable[[], float], living: Living | None, mesh: Mesh) -> int:
    """The peak of the second step: the first makes what later ones find."""
    step()
    if living is not None:
        living.storages.restart("step")
        step()
        return living.storages.most
    torch.cuda.reset_peak_memory_stats(mesh.device)
    step()
    return torch.cuda.max_memory_allocated(mesh.device)


def _profiled(trainer: Trainer, step: Callable[[], float], count: int, trace: Path) -> list[float]:
    """Steps under the profiler, with labels; the trace goes to a file."""
    on_gpu = trainer.mesh.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    seconds = []
    with ExitStack() as stack:
        stack.enter_context(labelled_modules(dict(trainer.replica.stages)))
        stack.enter_context(labelled_method(trainer.optimizer, "step", "optimizer"))
        stack.enter_context(labelled_collectives())
        with profile(activities=activities) as found:
            for number in range(count):
                with record_function(f"step:{number}"):
                    seconds.append(step())
    found.export_chrome_trace(str(trace))
    return seconds
