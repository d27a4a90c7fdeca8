"""A profile from what was asked to where the time went, predicted beside measured."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from meshwright.cluster import LOCAL_GPU
from meshwright.errors import InputError
from meshwright.machine import this_machine
from meshwright.plan import Plan, routed_evenly, write_plan
from meshwright.planner.interval import interval
from meshwright.planner.planned import planned
from meshwright.profiling.joined import Row, joined
from meshwright.profiling.predicted import Predicted, predicted
from meshwright.profiling.share import ShareAnswer, require_rank, share_of
from meshwright.profiling.trace import RankTrace, rank_trace
from meshwright.profiling.usage import RankUse, rank_use
from meshwright.runnable import TRAINING, require_installed, require_runnable
from meshwright.runs import FILE, Figures, RunRecord, predictions_of, record_of, write_record
from meshwright.torchrun import is_first_rank, is_under_torchrun

Progress = Callable[[str, int, int], None]
USUAL_STEPS = 10
MOST_STEPS = 1000


@dataclass(frozen=True)
class Asked:
    """The command line of `profile`."""

    file: str
    overrides: tuple[str, ...] = ()
    steps: int = USUAL_STEPS
    nproc: int | None = None
    output: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    balanced: bool = False
    rank: int | None = None


class RankFigures(Protocol):
    """What one rank measured, as the runtime's session gives it: steps without and with the profiler in
    seconds, peak bytes, the GPU's name, the file of its trace, and of a rank alone the seconds of answers."""

    @property
    def rank(self) -> int: ...
    @property
    def step_s(self) -> tuple[float, ...]: ...
    @property
    def profiled_s(self) -> tuple[float, ...]: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def gpu(self) -> str | None: ...
    @property
    def trace(self) -> Path: ...
    @property
    def answered_s(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class ProfileAnswer:
    """Where a step's time and memory go. `step_s`: seconds of each step without the profiler, on the slowest
    rank; `peak_bytes`: measured by rank."""

    plan: Plan
    step_s: tuple[float, ...]
    profiled_s: tuple[float, ...]
    uses: tuple[RankUse, ...]
    rows: tuple[Row, ...]
    predicted: Predicted
    peak_bytes: tuple[int, ...]
    record: RunRecord

    @property
    def step_time_s(self) -> float:
        """The median step without the profiler."""
        return statistics.median(self.step_s)

    @property
    def slowest(self) -> RankUse:
        """The rank that computes longest: the others wait for it."""
        return max(self.uses, key=lambda use: use.compute_s)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        low, high = interval(self.plan, self.predicted.step.step_time_s)
        return {
            "plan": self.plan.name,
            "digest": self.plan.digest,
            "machine": self.record.machine.model_dump(mode="json"),
            "calibration": self.record.calibration,
            "step_time_s": self.step_time_s,
            "steps_s": list(self.step_s),
            "profiled_step_time_s": statistics.median(self.profiled_s),
            "predicted_step_time_s": self.predicted.step.step_time_s,
            "predicted_low_s": low,
            "predicted_high_s": high,
            "ranks": [use.document() for use in self.uses],
            "slowest_rank": self.slowest.rank,
            "idle_s": {
                "measured": sum(use.idle_s for use in self.uses) / len(self.uses),
                "predicted": self.predicted.idle_s,
            },
            "memory_bytes": {
                "measured": list(self.peak_bytes),
                "predicted_by_pipeline_rank": list(self.predicted.tensor_bytes),
            },
            "disagreements": [row.document() for row in self.rows],
        }


def profile(asked: Asked, progress: Progress) -> ProfileAnswer | ShareAnswer | None:
    """Run a plan's steps, or one rank's share of them, and hold them against the prediction; None on ranks of
    torchrun but the first, which answers for all. Raises InputError and MeshwrightError."""
    if not 1 <= asked.steps <= MOST_STEPS:
        raise InputError("--steps", asked.steps, f"between 1 and {MOST_STEPS} steps", [USUAL_STEPS])
    plan = planned(asked.file, asked.overrides, "native", progress)
    require_runnable(plan)
    if asked.rank is None:
        _require_ranks(plan, asked.nproc)
    else:
        require_rank(plan, asked.rank, asked.nproc)
    folder = _free(asked.output) if is_first_rank() else None
    require_installed("profiling", TRAINING)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on stderr otherwise
    with tempfile.TemporaryDirectory(prefix="meshwright-") as traces:
        found = _measured(plan, asked, Path(traces))
        if not is_first_rank():
            return None
        answer: ProfileAnswer | ShareAnswer
        if asked.rank is None:
            answer = _answer(plan, found, asked.balanced)
        else:
            answer = _share(plan, asked.rank, found[0])
        if folder is not None:
            _keep(answer, Path(traces), folder)
    return answer


def _free(output: str | None) -> Path | None:
    """The run's folder, made where it is missing, which holds no other run. Raises InputError."""
    if output is None:
        return None
    if not output.strip():
        raise InputError("--output", output, "a folder", ["runs/first"])
    folder = Path(output)
    if (folder / FILE).exists() or (folder / "plan.yaml").exists():
        raise InputError("--output", output, "the folder of another run, which is kept", [f"{folder}-2"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--output", output, f"cannot be written: {error.strerror}") from None
    return folder


def _require_ranks(plan: Plan, nproc: int | None) -> None:
    world = plan.layout.world_size
    if nproc is not None and nproc != world:
        raise InputError("--nproc", nproc, f"the plan's layout has {world} ranks", [world])
    if nproc is None and plan.cluster.gpu.name != LOCAL_GPU and not is_under_torchrun():
        rule = "the plan is for a cluster: start its ranks with torchrun, or say how many to start here"
        raise InputError("--nproc", "missing", rule, [world])


def _move_traces(source: Path, target: Path) -> None:
    """Traces packed, as Perfetto opens them."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.trace.json")):
        with path.open("rb") as plain, gzip.open(target / f"{path.name}.gz", "wb", compresslevel=5) as packed:
            shutil.copyfileobj(plain, packed)


def _measured(plan: Plan, asked: Asked, traces: Path) -> Sequence[RankFigures]:
    from meshwright.runtime.profile import Session, profile_plan

    data = Path(asked.file).resolve().parent
    evenly = asked.balanced or asked.rank is not None  # what other ranks send follows from even routing
    return profile_plan(plan, Session(data, traces, asked.steps, evenly, asked.rank), asked.device)


def _share(plan: Plan, rank: int, found: RankFigures) -> ShareAnswer:
    trace = rank_trace(rank, json.loads(found.trace.read_text("utf-8"))["traceEvents"], answered=True)
    times = found.step_s, found.answered_s
    return share_of(plan, rank, this_machine(found.gpu), times, found.peak_bytes, trace)


def _answer(plan: Plan, found: Sequence[RankFigures], balanced: bool) -> ProfileAnswer:
    as_run = routed_evenly(plan) if balanced else plan
    traces: list[RankTrace] = []
    for one in found:
        traces.append(rank_trace(one.rank, json.loads(one.trace.read_text("utf-8"))["traceEvents"]))
    modules = {name for trace in traces for name in trace.forward}
    expected = predicted(as_run, modules)
    ranks_of_stage = plan.layout.world_size // plan.layout.pp
    step_s = _slowest([one.step_s for one in found])
    peaks = tuple(one.peak_bytes for one in found)
    figures = Figures(step_time_s=statistics.median(step_s), peak_memory_bytes=max(peaks))
    said = predictions_of(as_run, "tensors")
    record = record_of("profile", plan, found[0].gpu, len(step_s), figures, "tensors", said)
    return ProfileAnswer(
        plan,
        step_s,
        _slowest([one.profiled_s for one in found]),
        tuple(map(rank_use, traces)),
        tuple(joined(expected, traces, ranks_of_stage)),
        expected,
        peaks,
        record,
    )


def _slowest(by_rank: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Each step on the rank that took longest."""
    return tuple(max(times) for times in zip(*by_rank, strict=True))


def _keep(answer: ProfileAnswer | ShareAnswer, traces: Path, folder: Path) -> None:
    """Plan, traces and measurements in the run's folder, and the record of a whole run."""
    write_plan(answer.plan, folder / "plan.yaml")
    _move_traces(traces, folder / "traces")
    text = json.dumps(answer.document(), ensure_ascii=False, allow_nan=False, indent=1)
    (folder / "profile.json").write_text(text + "\n", "utf-8")
    if isinstance(answer, ProfileAnswer):
        write_record(answer.record, folder)
