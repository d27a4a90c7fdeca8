"""The folders of runs: what was predicted of each and what was measured, and how far the two were apart.

`train -o` and `profile -o` leave a `run.yaml` beside the plan. Predictions of a plan on a machine with runs
say how far those of before were off.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from meshwright.cluster import LOCAL_GPU, Cluster
from meshwright.cost.memory import memory, worst
from meshwright.errors import InputError
from meshwright.files import Noun, decode, read_yaml, to_yaml, write_text
from meshwright.gpus import is_named
from meshwright.ir.program import lower
from meshwright.machine import Machine, this_machine
from meshwright.plan import Plan
from meshwright.simulator.simulate import simulate
from meshwright.units import Count, Number

FILE = "run.yaml"
JOURNAL = "steps.jsonl"
MOST_DEEP = 3
"""Folders inside one another that are looked through for runs."""
MOST_COUNTED, WARMING = 200, 2
"""The last steps of a training run, of which the median counts, without the first ones of a short run."""
MemoryOf = Literal["tensors", "process"]


class Figures(Noun):
    """Of a step: seconds, and bytes of the fullest rank: what tensors hold, or a process as a whole."""

    step_time_s: Number
    peak_memory_bytes: Count

    @model_validator(mode="after")
    def _takes_time(self) -> Figures:
        if self.step_time_s <= 0:
            raise InputError("step_time_s", self.step_time_s, "a step takes time: more than 0 s")
        return self


class RunRecord(Noun):
    """One run. `gpu` is the plan's, `machine` what it really ran on; `calibration` the digest of the table
    that priced the prediction."""

    kind: Literal["train", "profile"]
    date: str
    plan: str
    digest: str
    layout: dict[str, int]
    ranks: Count
    gpu: str
    machine: Machine
    calibration: str | None = None
    memory_of: MemoryOf = "tensors"
    steps: Count
    predicted: Figures
    measured: Figures

    @property
    def time_error(self) -> float:
        """Predicted step time over the measured one, − 1."""
        return self.predicted.step_time_s / self.measured.step_time_s - 1

    @property
    def memory_error(self) -> float:
        """Predicted peak memory over the measured one, − 1."""
        return self.predicted.peak_memory_bytes / self.measured.peak_memory_bytes - 1


@dataclass(frozen=True)
class Found:
    """A run's folder and its record."""

    folder: str
    record: RunRecord

    def document(self) -> dict[str, Any]:
        """As JSON."""
        record = self.record
        return {
            "folder": self.folder,
            **record.model_dump(mode="json"),
            "time_error": record.time_error,
            "memory_error": record.memory_error,
        }


@dataclass(frozen=True)
class History:
    """How far predictions of the runs on one machine were off: means of |predicted/measured − 1|, and of
    predicted/measured − 1 with its sign. `calibrated`: those that a table priced."""

    runs: int
    calibrated: bool
    mean_error: float
    bias: float

    @property
    def words(self) -> str:
        """The history in one line."""
        if not self.runs:
            return "no run on this machine has been kept there"
        how = " with a calibration" if self.calibrated else ""
        side = "long" if self.bias > 0 else "short"
        runs = f"{self.runs} run{'s' if self.runs > 1 else ''} on this machine"
        were = "were" if self.runs > 1 else "was"
        return (
            f"{runs}, predicted{how}, {were} off by {self.mean_error:.0%} in the mean "
            f"(predictions {abs(self.bias):.0%} too {side})"
        )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "words": self.words}


def predictions_of(plan: Plan, memory_of: MemoryOf) -> Figures:
    """What is predicted of a plan: its simulated step, and the memory of its fullest rank."""
    fullest = worst(memory(lower(plan)))
    size = fullest.allocated_bytes if memory_of == "tensors" else fullest.total_bytes
    return Figures(step_time_s=simulate(plan).step_time_s, peak_memory_bytes=size)


def record_of(
    kind: Literal["train", "profile"],
    plan: Plan,
    gpu: str | None,
    steps: int,
    measured: Figures,
    memory_of: MemoryOf,
    predicted: Figures | None = None,
) -> RunRecord:
    """The record of a run that has ended, with what was predicted of it: of its plan, unless told."""
    table = plan.cluster.calibration
    return RunRecord(
        kind=kind,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        plan=plan.name,
        digest=plan.digest,
        layout=plan.layout.degrees(),
        ranks=plan.layout.world_size,
        gpu=plan.cluster.gpu.name,
        machine=this_machine(gpu),
        calibration=None if table is None else table.digest,
        memory_of=memory_of,
        steps=steps,
        predicted=predicted or predictions_of(plan, memory_of),
        measured=measured,
    )


def write_record(record: RunRecord, folder: Path) -> None:
    """Leave a record in its run's folder, whole or not at all."""
    write_text(folder / FILE, to_yaml(record.model_dump(mode="json", exclude_none=True)))


def journal_lines(folder: Path) -> int:
    """How many lines the journal of a run's folder has; 0 where there is none."""
    try:
        return len((folder / JOURNAL).read_text("utf-8").splitlines())
    except OSError:
        return 0


def keep_training(plan: Plan, folder: Path, gpu: str | None, before: int = 0) -> None:
    """Leave the record of a training run in its folder, from the steps that its journal holds after `before`
    lines, which are those of earlier runs. A run that made no step has none. Raises InputError where nothing
    can be predicted of the plan."""
    steps = [*_steps(folder, before)][-MOST_COUNTED:]
    counted = steps[WARMING:] if len(steps) > 2 * WARMING else steps
    if not counted:
        return
    seconds = statistics.median(step["step_time_s"] for step in counted)
    figures = Figures(step_time_s=seconds, peak_memory_bytes=steps[-1]["peak_memory_bytes"])
    memory_of: MemoryOf = "process" if gpu is None else "tensors"
    write_record(record_of("train", plan, gpu, len(counted), figures, memory_of), folder)


def _steps(folder: Path, before: int) -> Iterator[dict[str, Any]]:
    """The steps of a journal, without lines that a run could not finish."""
    try:
        lines = (folder / JOURNAL).read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines[before:]:
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def runs_in(folder: str | Path, key: str = "FOLDER") -> list[Found]:
    """The runs in a folder and the folders in it, by date. Raises InputError for no folder, and for a record
    that cannot be read."""
    base = Path(folder)
    if not base.is_dir():
        near = (
            sorted(str(path) for path in base.parent.glob("*") if path.is_dir())[:3]
            if base.parent.is_dir()
            else []
        )
        raise InputError(key, str(folder), "a folder in which runs were kept by `train -o`", near)
    found = []
    for path in _records(base, MOST_DEEP):
        inside = str(path.parent.relative_to(base))
        found.append(Found(inside, decode(RunRecord, read_yaml(path), str(path))))
    return sorted(found, key=lambda one: one.record.date)


def _records(folder: Path, deep: int) -> Iterator[Path]:
    if (folder / FILE).is_file():
        yield folder / FILE
    if deep:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink() and path.name not in ("checkpoints", "tensorboard"):
                yield from _records(path, deep - 1)


def history_of(runs: Sequence[Found], cluster: Cluster) -> History:
    """The history of the machine that a cluster stands for: the one at hand for local processes, else every
    machine that has its GPU and computed on it; priced by a table where the cluster is."""
    calibrated = cluster.calibration is not None

    def matches(record: RunRecord) -> bool:
        if (record.calibration is not None) is not calibrated:
            return False
        if cluster.gpu.name == LOCAL_GPU:
            return record.gpu == LOCAL_GPU and record.machine.is_here
        return record.machine.gpu is not None and is_named(cluster.gpu.name, record.machine.gpu)

    errors = [one.record.time_error for one in runs if matches(one.record)]
    if not errors:
        return History(0, calibrated, 0.0, 0.0)
    return History(len(errors), calibrated, sum(map(abs, errors)) / len(errors), sum(errors) / len(errors))
