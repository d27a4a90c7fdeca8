"""Timing many things in turns, so that a busy moment of the machine touches all alike, until time is up."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

LEAST_ROUNDS, MOST_ROUNDS = 3, 40
"""Rounds: at least these, even when the time is over, and at most those."""
REPEATS = 3
"""Samples of a thing in its turn, after a run that is not counted: a step runs each op many times, so that
its code is in the caches."""

Timed = Callable[[], float]
"""Runs a thing once and returns its seconds."""
GoesOn = Callable[[bool], bool]
"""Given what this rank would do, what all ranks do: go on with another round, or stop."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """Seconds of one thing: the median or a mean, half the range of the quartiles over the median, how many
    samples."""

    time_s: float
    spread: float
    samples: int


def in_turns(things: Sequence[Timed], budget_s: float, goes_on: GoesOn) -> list[list[float]]:
    """The samples of each thing. The first round warms up and is left out, as is the first run of a turn."""
    samples: list[list[float]] = [[] for _ in things]
    for thing in things:
        thing()
    until = time.perf_counter() + budget_s
    count = 0
    while True:
        wanted = count < MOST_ROUNDS and (count < LEAST_ROUNDS or time.perf_counter() < until)
        if not goes_on(wanted):
            return samples
        for thing, seconds in zip(things, samples, strict=True):
            thing()
            seconds += [thing() for _ in range(REPEATS)]
        count += 1


def summed_up(seconds: Sequence[float]) -> Sampled:
    """Median and spread of samples."""
    ordered = sorted(seconds)
    middle = statistics.median(ordered)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return Sampled(middle, (high - low) / 2 / middle if middle else 0.0, len(ordered))


def averaged(seconds: Sequence[float]) -> Sampled:
    """As `summed_up`, with the mean of all but the slowest twentieth: a step makes many of a thing, and what
    they take together is not the median's multiple."""
    ordered = sorted(seconds)
    kept = ordered[: max(len(ordered) * 19 // 20, 1)]
    return replace(summed_up(seconds), time_s=statistics.fmean(kept))


Clock = Callable[[], float]


def clock_of(device: torch.device, num_ranks: int) -> Clock:
    """What times the work of a rank. One thread with a processor of its own is timed by what it computes:
    the time in which other programs have its processor is no property of the machine. Several threads wait
    for one another, and ranks that share processors for theirs: there the time on the wall counts."""
    own = device.type == "cpu" and torch.get_num_threads() == 1 and num_ranks <= (os.cpu_count() or 1)
    return time.thread_time if own else time.perf_counter


def seconds_of(work: Callable[[], object], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Seconds from the start of some work to its end on the device."""
    if device.type == "cuda":
        return _on_gpu(work)
    began = clock()
    work()
    return clock() - began


def _on_gpu(work: Callable[[], object]) -> float:
    """By events on the stream: what the device takes, without what the host needs to launch it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # the queue is full before the first kernel starts
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3
