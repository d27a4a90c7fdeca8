"""`meshwright train`: from a checked plan and what was asked to ranks that train, watched by one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch.distributed as dist

from meshwright.cluster import LOCAL_GPU
from meshwright.deployment import Training
from meshwright.errors import InputError, MeshwrightError
from meshwright.plan import Plan
from meshwright.runtime.data import DataStream, open_stream
from meshwright.runtime.journal import Journal
from meshwright.runtime.launch import DeviceKind, run_joined, run_local
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.metrics import Record
from meshwright.runtime.roster import RankFacts, roster
from meshwright.runtime.step import Trainer
from meshwright.runtime.train import Run, train
from meshwright.torchrun import is_under_torchrun


class Audience(Protocol):
    """Who is told, on the first rank alone: of the ranks before the first step, of each step, of the end."""

    def started(self, ranks: Sequence[RankFacts], steps_done: int) -> None:
        """All is built; so many steps were done by the run that is resumed."""

    def stepped(self, step: Record) -> None:
        """A step is done."""

    def ended(self) -> None:
        """The run is over, or failed."""


Reading = Callable[[], AbstractContextManager[Callable[[int, int], None] | None]]
"""Gives whom to tell of bytes read and of all bytes, while it is entered."""


def train_plan(
    plan: Plan,
    run: Run,
    num_ranks: int | None,
    device: DeviceKind,
    audience: Callable[[DataStream], Audience],
    reading: Reading = nullcontext,
) -> None:
    """Train a plan that holds every rule of `verify`, on local ranks or as one of torchrun's.

    `num_ranks` None takes the plan's, where this machine is the plan's cluster. `reading` watches while text
    is read, and is done before ranks are forked: a thread that draws would leave them its locks. Raises
    InputError.
    """
    training = plan.training or Training()

    def opened() -> DataStream:
        vocabulary = plan.model.vocab_size
        with reading() as progress:
            return open_stream(training, plan.workload, vocabulary, run.folder, progress=progress)

    if is_under_torchrun():
        if num_ranks is not None:
            raise InputError("--nproc", num_ranks, "torchrun has started the ranks already; leave it out")
        run_joined(plan, device, lambda mesh: _rank(plan, mesh, _opened_by_all(opened, mesh), run, audience))
        return
    stream = opened()  # before the ranks start: they share what it has mapped
    count = _local_ranks(plan, num_ranks)
    run_local(plan, count, device, lambda mesh: _rank(plan, mesh, stream, run, audience))


def _local_ranks(plan: Plan, asked: int | None) -> int:
    if asked is not None:
        return asked
    if plan.cluster.gpu.name != LOCAL_GPU:
        rule = "the plan is for a cluster: start its ranks with torchrun, or shrink it with --scale-down"
        raise InputError("--nproc", "missing", rule, [plan.layout.world_size])
    return plan.layout.world_size


def _opened_by_all(opened: Callable[[], DataStream], mesh: Mesh) -> DataStream:
    """One rank of each machine makes the tokens; the others find them. What is wrong with the data for one
    is said by all: none is left waiting."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    stream, error = None, None
    try:
        stream = opened() if first else None
    except MeshwrightError as found:
        error = str(found)
    errors = [error] * mesh.layout.world_size
    if len(errors) > 1:
        dist.all_gather_object(errors, error, group=mesh.group("coordination"))
    wrong = next((message for message in errors if message is not None), None)
    if wrong is not None:
        raise MeshwrightError(wrong)
    return stream or opened()


def _rank(
    plan: Plan, mesh: Mesh, stream: DataStream, run: Run, audience: Callable[[DataStream], Audience]
) -> None:
    watching = mesh.rank == 0
    told = audience(stream) if watching else None
    journal: Journal | None = None

    def report(record: Record) -> None:
        if journal is not None:
            journal.write(record)
        if told is not None:
            told.stepped(record)

    def started(trainer: Trainer) -> None:
        nonlocal journal
        if watching and run.output is not None:  # not before: a run that is refused changes nothing there
            journal = Journal(run.output, plan)
        ranks = roster(trainer)
        if told is not None:
            told.started(ranks, trainer.steps)

    try:
        train(plan, mesh, stream, run, started, report)
    finally:
        if journal is not None:
            journal.close()
        if told is not None:
            told.ended()
