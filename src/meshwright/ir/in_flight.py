"""What a rank holds at its fullest moments, without building an order of thousands of micro-batches.

After a few rounds a pipeline repeats itself, so that more micro-batches never make a rank hold more. The
moments that can be the fullest are those whose counts no other moment of the rank reaches in every chunk.
"""

from __future__ import annotations

from functools import lru_cache

from meshwright.ir import orders
from meshwright.ir.schedule import (
    HELD_CHANGES,
    ActivationPeak,
    build_schedule,
    live_at_peak,
    order_of_rank,
    require_buildable,
    stage_of,
)
from meshwright.policy import ScheduleName

Moment = tuple[tuple[int, ...], tuple[int, ...]]
"""By chunk: micro-batches held whole, and those of which a deferred weight gradient holds its part."""

_ROUNDS = 2
"""Rounds after which interleaving repeats itself, and multiples of P after which a V does; found by comparing
orders of up to ten rounds, 16 ranks and 30 chunks."""


def enough_micro_batches(name: ScheduleName, num_ranks: int, num_micro_batches: int) -> int:
    """The fewest micro-batches, at most those given, under which every rank holds as much at its fullest
    moments. GPipe holds all of them, so it needs all; the others repeat themselves."""
    match name:
        case "GPipe":
            return num_micro_batches
        case "1F1B":
            return min(num_micro_batches, num_ranks)
        case "Interleaved1F1B" | "InterleavedZeroBubble":
            rounds = orders.num_rounds(num_ranks, num_micro_batches)
            if num_micro_batches % rounds:
                return num_micro_batches
            return num_micro_batches // rounds * min(rounds, _ROUNDS)
        case _:
            return min(num_micro_batches, _ROUNDS * num_ranks)


def fullest_moments(
    name: ScheduleName, num_ranks: int, chunks_per_rank: int, num_micro_batches: int, rank: int
) -> tuple[Moment, ...]:
    """The moments of a rank at which it can hold most, whatever a micro-batch weighs on each chunk."""
    if name == "GPipe":
        return (((num_micro_batches,), (0,)),)
    enough = enough_micro_batches(name, num_ranks, num_micro_batches)
    return _moments(name, num_ranks, chunks_per_rank, enough, rank)


@lru_cache(maxsize=4096)
def _moments(
    name: ScheduleName, num_ranks: int, chunks_per_rank: int, num_micro_batches: int, rank: int
) -> tuple[Moment, ...]:
    chunk_of_stage = {stage_of(name, rank, c, num_ranks): c for c in range(chunks_per_rank)}
    held, waiting = [0] * chunks_per_rank, [0] * chunks_per_rank
    seen: dict[tuple[int, ...], None] = {}
    for action in order_of_rank(name, rank, num_ranks, chunks_per_rank, num_micro_batches):
        for part in action.simple_actions if action is not None else ():
            forward, weight = HELD_CHANGES[part.kind]
            chunk = chunk_of_stage[part.stage]
            held[chunk] += forward
            waiting[chunk] += weight
            if forward > 0 or weight > 0:  # only what adds something can lead to a fullest moment
                seen[(*held, *waiting)] = None
    fullest: list[tuple[int, ...]] = []
    for moment in sorted(seen, key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(known, moment, strict=True)) for known in fullest):
            fullest.append(moment)
    return tuple((moment[:chunks_per_rank], moment[chunks_per_rank:]) for moment in sorted(fullest))


def peak_of_rank(
    name: ScheduleName,
    num_ranks: int,
    chunks_per_rank: int,
    num_micro_batches: int,
    rank: int,
    forward_bytes: list[int],
    weight_bytes: list[int],
) -> ActivationPeak:
    """`live_at_peak` of a rank, from an order no longer than needed; `slot` is that order's.

    Raises InputError as `require_buildable` does for what is too few or does not split.
    """
    if name == "GPipe":
        require_buildable(name, num_ranks, 1, chunks_per_rank)
        size = num_micro_batches * forward_bytes[rank]
        held = (num_micro_batches if size else 0,)
        return ActivationPeak(rank, num_micro_batches - 1, size, (rank,), held, (0,))
    enough = enough_micro_batches(name, num_ranks, num_micro_batches)
    schedule = build_schedule(name, num_ranks, enough, chunks_per_rank)
    return live_at_peak(schedule, rank, forward_bytes, weight_bytes)
