"""What `meshwright train` was asked, checked, planned and handed to the runtime."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meshwright.deployment import Training
from meshwright.efficiency_table import read_table
from meshwright.errors import InputError
from meshwright.plan import Plan
from meshwright.planner.planned import planned
from meshwright.runnable import TRAINING, require_installed, require_runnable
from meshwright.runs import FILE, journal_lines, keep_training
from meshwright.scale_down import ScaledDown, scaled_down
from meshwright.terminal.progress import progress_bar
from meshwright.terminal.train import JsonLines, Screen
from meshwright.torchrun import is_first_rank

SCALED_RANKS = 8
"""Ranks of a scaled-down plan unless told otherwise: two of each of tp, pp and dp."""


@dataclass(frozen=True)
class Asked:
    """The command line of `train`. `calibration`: the table of a plan that is scaled down; of another it is
    among the overrides."""

    file: str
    overrides: tuple[str, ...]
    nproc: int | None
    scale_down: bool
    device: Literal["auto", "cpu", "cuda"]
    steps: int | None
    output: str | None
    save_every: int
    keep: int | None
    resume: bool
    as_json: bool
    calibration: str | None = None


def train(asked: Asked) -> None:
    """Train what was asked. Raises InputError and MeshwrightError."""
    _check(asked)
    plan, changes = _plan(asked)
    require_installed("training", TRAINING)
    # Threads that spin while they wait take the cores from ranks that work: a hundred times slower where
    # others compute too. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from meshwright.runtime.command import train_plan
    from meshwright.runtime.data import unigram_entropy
    from meshwright.runtime.train import Run

    output = None if asked.output is None else Path(asked.output)
    folder = Path(asked.file).resolve().parent
    run = Run(folder, output, asked.save_every, asked.keep, asked.resume)
    training = plan.training or Training()

    def audience(stream: Any) -> JsonLines | Screen:
        if asked.as_json:
            return JsonLines()
        return Screen(plan, training.steps, changes, unigram_entropy(stream))

    before = 0 if output is None else journal_lines(output)
    train_plan(plan, run, _num_ranks(asked, plan), asked.device, audience, _reading)
    if output is not None and is_first_rank():
        _keep_record(plan, output, asked, before)


def _keep_record(plan: Plan, output: Path, asked: Asked, before: int) -> None:
    """What was predicted of the run beside what it took, for `runs`; `before`: steps that were there."""
    from meshwright.runtime.launch import gpu_name

    local = int(os.environ.get("LOCAL_WORLD_SIZE", plan.layout.world_size))
    try:
        keep_training(plan, output, gpu_name(asked.device, local), before)
    except InputError as error:
        print(f"note: no prediction, so no {FILE} for `runs`: {error}", file=sys.stderr)


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    with progress_bar() as progress:
        yield lambda done, total: progress("reading text", done, total)


def _plan(asked: Asked) -> tuple[Plan, Sequence[str]]:
    with progress_bar() as progress:
        plan = planned(asked.file, asked.overrides, "native", progress)
    changes: tuple[str, ...] = ()
    if asked.scale_down:
        scaled = _scaled(plan, SCALED_RANKS if asked.nproc is None else asked.nproc)
        plan, changes = _priced(scaled.plan, asked.calibration), scaled.changes
    if asked.steps is not None:
        training = (plan.training or Training()).model_copy(update={"steps": asked.steps})
        plan = plan.model_copy(update={"training": training})
    require_runnable(plan)
    return plan, changes


def _priced(plan: Plan, calibration: str | None) -> Plan:
    """A scaled-down plan with the table of the machine that it runs on."""
    if calibration is None:
        return plan
    table = plan.cluster.model_copy(update={"calibration": read_table(calibration)})
    return plan.model_copy(update={"cluster": table})


def _scaled(plan: Plan, num_ranks: int) -> ScaledDown:
    try:
        return scaled_down(plan, num_ranks)
    except InputError as error:
        key = "--nproc" if error.key == "num_ranks" else error.key
        raise InputError(key, error.value, error.rule, error.nearest) from None


def _num_ranks(asked: Asked, plan: Plan) -> int | None:
    return plan.layout.world_size if asked.scale_down else asked.nproc


def _check(asked: Asked) -> None:
    for flag, value in (("--nproc", asked.nproc), ("--steps", asked.steps), ("--keep", asked.keep)):
        if value is not None and value < 1:
            raise InputError(flag, value, "at least 1", [1])
    stream: object = sys.stdout
    if stream is None:
        raise InputError("standard output", "closed", "there is no place to print to", ["> run.jsonl"])
    if asked.output is not None and not asked.output.strip():
        raise InputError("--output", asked.output, "a folder", ["runs/first"])
    if asked.save_every < 0:
        raise InputError("--save-every", asked.save_every, "a number of steps; 0 saves at the end", [100])
    for flag, given in (
        ("--resume", asked.resume),
        ("--save-every", asked.save_every),
        ("--keep", asked.keep),
    ):
        if given and asked.output is None:
            raise InputError("--output", "missing", f"{flag} needs the run's folder", ["-o runs/first"])
