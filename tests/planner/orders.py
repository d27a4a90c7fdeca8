"""Pipelines run action by action: what array forms are held against."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.ir.schedule import ActionKind, build_schedule
from meshwright.policy import ScheduleName

Row = Sequence[float]


def ends_of_ranks(
    name: ScheduleName, shape: tuple[int, int, int], stages: Sequence[Row], ready: Row, lags: Sequence[Row]
) -> list[float]:
    """When each rank is done. `shape` is ranks, chunks and micro-batches; `stages` forward, input-gradient
    and weight-gradient seconds by stage; `ready` when ranks may start; `lags` for how long a forward and a
    gradient are under way."""
    ranks, chunks, count = shape
    schedule = build_schedule(name, ranks, count, chunks)
    left = [list(schedule.actions(rank)) for rank in range(ranks)]
    free, made = list(ready), dict[tuple[bool, int, int | None], float]()
    last, moved = schedule.num_stages - 1, True
    while moved:
        moved = False
        for rank, actions in enumerate(left):
            while actions:
                start, seconds = free[rank], 0.0
                for part in actions[0].simple_actions:
                    forward = part.kind is ActionKind.FORWARD
                    weight = part.kind is ActionKind.WEIGHT_GRADIENT
                    inner = part.kind in (ActionKind.INPUT_GRADIENT, ActionKind.BACKWARD)
                    full = part.kind is ActionKind.BACKWARD
                    seconds += stages[0][part.stage] * forward + stages[1][part.stage] * inner
                    seconds += stages[2][part.stage] * (weight or full)
                    other = part.stage - 1 if forward else part.stage + 1
                    if not weight and 0 <= other <= last:
                        sent = made.get((forward, other, part.micro_batch), float("inf"))
                        start = max(start, sent + lags[not forward][other])
                if start == float("inf"):
                    break
                free[rank] = start + seconds
                for part in actions.pop(0).simple_actions:
                    if part.kind is not ActionKind.WEIGHT_GRADIENT:
                        forward = part.kind is ActionKind.FORWARD
                        made[forward, part.stage, part.micro_batch] = free[rank]
                moved = True
    assert not any(left)
    return free
