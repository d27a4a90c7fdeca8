"""The loop of one rank: batches in, records out, checkpoints between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from meshwright.errors import InputError, MeshwrightError
from meshwright.plan import Plan
from meshwright.runtime import checkpoint, state
from meshwright.runtime.data import DataStream
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.metrics import Record, record
from meshwright.runtime.step import Trainer, inputs_of, rows_of_rank


@dataclass(frozen=True)
class Run:
    """How a run goes beside its plan. `folder`: the deployment file's, from which data are looked up.
    `output`: the run's folder, None to keep nothing. `save_every` 0 saves at the end alone. `keep`: how many
    checkpoints stay, None for all."""

    folder: Path
    output: Path | None = None
    save_every: int = 0
    keep: int | None = None
    resume: bool = False

    @property
    def checkpoints(self) -> Path | None:
        """Where checkpoints go."""
        return None if self.output is None else self.output / "checkpoints"


Started = Callable[[Trainer], None]
Report = Callable[[Record], None]


def train(plan: Plan, mesh: Mesh, stream: DataStream, run: Run, started: Started, report: Report) -> Trainer:
    """Train to the plan's last step. Every rank calls it; so is `started`, when all is built and before the
    first step, and `report` with every step.

    Raises MeshwrightError, the same on every rank.
    """
    _require_new(run, mesh)
    trainer = Trainer(plan, mesh)
    if run.resume:
        _resume(trainer, stream, run)
    started(trainer)
    rows = rows_of_rank(plan, mesh)
    saved = trainer.steps if run.resume else None
    while trainer.steps < trainer.training.steps:
        began = time.perf_counter()
        batch = stream.next(rows)
        scale = trainer.scaler.scale
        try:
            result = trainer.step(*inputs_of(batch, mesh.device))
        except FloatingPointError as error:
            raise MeshwrightError(
                f"step {trainer.steps + 1}: {error}; lower training.learning_rate, or resume from a "
                "checkpoint before it"
            ) from None
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        report(record(trainer, result, batch, time.perf_counter() - began, scale))
        if run.save_every and trainer.steps % run.save_every == 0:
            saved = _save(trainer, stream, run)
    if run.checkpoints is not None and saved != trainer.steps:
        _save(trainer, stream, run)
    return trainer


def _require_new(run: Run, mesh: Mesh) -> None:
    """Raise InputError for a new run into the folder of another one: their checkpoints would mix, and of two
    of one step the second could not be saved."""
    if run.resume or run.checkpoints is None:
        return
    found = checkpoint.newest(run.checkpoints, mesh.group("coordination"))
    if found is not None:
        rule = f"holds {found.name} of another run: go on with it by --resume, or name a new folder"
        raise InputError("--output", str(run.output), rule)


def _save(trainer: Trainer, stream: DataStream, run: Run) -> int:
    if run.checkpoints is not None:
        state.save(trainer, stream, run.checkpoints, run.keep)
    return trainer.steps


def _resume(trainer: Trainer, stream: DataStream, run: Run) -> None:
    """Take the newest whole checkpoint of the run's folder."""
    assert run.checkpoints is not None
    path = checkpoint.newest(run.checkpoints, trainer.mesh.group("coordination"))
    if path is None:
        raise InputError("--resume", str(run.checkpoints), "no whole checkpoint is there")
    state.restore(trainer, stream, path)
