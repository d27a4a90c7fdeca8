"""Work on many ranks, divided over forked processes: each is one rank after another."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from meshwright.errors import MeshwrightError
from meshwright.ir.observed import Conduct, Observed
from meshwright.plan import Plan
from meshwright.runtime.dryrun.probe import probe, told
from meshwright.runtime.dryrun.rehearse import facts_of, observe
from meshwright.runtime.dryrun.world import rank_of

MOST_PROCESSES = 8
USUAL = 4
"""Ranks after which a process has seen most ops: one of each stage."""
Done = Callable[[int], None]
"""Told how many more ranks are done."""


def probe_all(plan: Plan, ranks: Sequence[int], done: Done) -> list[Observed]:
    """The conduct of each rank in a short step, in the order of the ranks."""
    torch.set_num_threads(1)
    first = probe(plan, ranks[0])  # what it makes, forked processes share
    done(1)
    return [first, *_each(probe, plan, ranks[1:], done)]


def observe_all(plan: Plan, ranks: Sequence[int], done: Done) -> list[Observed]:
    """Each of these ranks through a whole step; what fails is told in its conduct."""
    return _each(_observed, plan, ranks, done)


def _observed(plan: Plan, rank: int) -> Observed:
    try:
        return observe(plan, rank)
    except Exception as error:
        failed = Conduct(failed=told(error))
    with rank_of(plan, rank) as mesh:
        return Observed(facts_of(mesh), failed)


def _each(
    run: Callable[[Plan, int], Observed], plan: Plan, ranks: Sequence[int], done: Done
) -> list[Observed]:
    torch.set_num_threads(1)  # threads that wait for one another would take the other processes' cores
    number = min(_processors(), MOST_PROCESSES, len(ranks))
    if number < 2 or sys.platform != "linux":
        found = []
        for rank in ranks:
            found.append(run(plan, rank))
            done(1)
        return found
    return _forked(run, plan, ranks, number, done)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forked(
    run: Callable[[Plan, int], Observed], plan: Plan, ranks: Sequence[int], number: int, done: Done
) -> list[Observed]:
    context = multiprocessing.get_context("fork")
    gc.freeze()  # what is there already stays shared: a collection would touch, and so copy, all of it
    pipes, processes = [], []
    for place in range(number):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(run, plan, ranks[place::number], theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        found = {observed.facts.rank: observed for observed in _received(pipes, done)}
    finally:
        for process in processes:
            process.kill()
            process.join()
        gc.unfreeze()
    missing = [rank for rank in ranks if rank not in found]
    if missing:
        raise MeshwrightError(f"a process that ran ranks {missing[:8]} has ended without a word")
    return [found[rank] for rank in ranks]


def _received(pipes: list[Connection], done: Done) -> Iterator[Observed]:
    open_pipes: list[Any] = list(pipes)
    known: dict[tuple[int, int], Conduct] = {}
    while open_pipes:
        for pipe in wait(open_pipes):
            assert isinstance(pipe, Connection)
            try:
                observed, number = pipe.recv()
            except EOFError:
                open_pipes.remove(pipe)
                continue
            place = id(pipe), number
            if observed.conduct is not None:
                known[place] = observed.conduct
            done(1)
            yield Observed(observed.facts, known[place], observed.peak, observed.build_bytes)


def _work(run: Callable[[Plan, int], Observed], plan: Plan, ranks: Sequence[int], pipe: Connection) -> None:
    """Sends what was seen of each rank; a conduct once, and then its number."""
    numbers: dict[Conduct, int] = {}
    for place, rank in enumerate(ranks):
        seen = run(plan, rank)
        if place == USUAL:
            gc.freeze()  # what is kept from rank to rank is there by now, and need not be looked at again
        new = seen.conduct not in numbers
        number = numbers.setdefault(seen.conduct, len(numbers))
        sent: Any = seen if new else Observed(seen.facts, None, seen.peak, seen.build_bytes)  # type: ignore[arg-type]
        pipe.send((sent, number))
    pipe.close()
    os._exit(0)
