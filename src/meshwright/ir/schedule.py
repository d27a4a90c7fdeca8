"""Pipeline schedules: which rank works on which stage and micro-batch, in what order, and what that costs.

`build_schedule` gives the orders of all ranks (`ir/orders.py`); the other functions read a Schedule: whether
it can run at all (`check`), how much it keeps alive (`activation_peaks`, `live_at_peak`, `peak_in_flight`)
and how long its ranks wait (`run_in_order`, `bubble_slots`). All take time linear in the number of actions.

P is the number of ranks, v the chunks a rank holds, m the number of micro-batches; there are P·v stages.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from meshwright.ir import orders
from meshwright.ir.buildable import MAX_FORWARDS, default_chunks, require_buildable
from meshwright.ir.orders import Action, ActionKind
from meshwright.policy import V_SCHEDULES, ScheduleName

__all__ = [
    "HELD_CHANGES",
    "MAX_FORWARDS",
    "Action",
    "ActionKind",
    "ActivationPeak",
    "Schedule",
    "ScheduleName",
    "Span",
    "activation_peaks",
    "bubble_slots",
    "build_schedule",
    "check",
    "default_chunks",
    "live_at_peak",
    "order_of_rank",
    "peak_in_flight",
    "rank_of",
    "require_buildable",
    "run_in_order",
    "stage_of",
]

Span = tuple[float, float]
"""Start and end of one action, in the unit of the durations it was computed from."""

HELD_CHANGES = {
    ActionKind.FORWARD: (1, 0),
    ActionKind.BACKWARD: (-1, 0),
    ActionKind.INPUT_GRADIENT: (-1, 1),
    ActionKind.WEIGHT_GRADIENT: (0, -1),
}
"""How many micro-batches an action adds to those held for the whole backward, and for W alone."""

_Event = tuple[ActionKind, int, int]
"""Something an action may wait for: a stage's forward, or its input gradient, of one micro-batch."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The orders of all ranks of one pipeline.

    `stages_of_rank[rank]` lists the stages of the rank by chunk. `orders[rank]` lists its actions; None is a
    slot in which the rank idles by design. GPipe and 1F1B name no idle slots: their ranks just wait.
    """

    name: ScheduleName
    num_ranks: int
    num_stages: int
    num_micro_batches: int
    stages_of_rank: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[Action | None, ...], ...]

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of a rank in order, without idle slots."""
        return (action for action in self.orders[rank] if action is not None)


@dataclass(frozen=True, slots=True)
class ActivationPeak:
    """The first moment at which a rank holds most activation bytes.

    `slot` indexes the rank's order. By chunk (stage `stages[chunk]`): `forward_held` counts the micro-batches
    whose whole activations are alive, `weight_held` those of which only what the deferred weight gradient
    needs is left.
    """

    rank: int
    slot: int
    peak_bytes: int
    stages: tuple[int, ...]
    forward_held: tuple[int, ...]
    weight_held: tuple[int, ...]

    @property
    def num_in_flight(self) -> int:
        """Forwards, over all chunks, that still wait for their backward."""
        return sum(self.forward_held)


def stage_of(name: ScheduleName, rank: int, chunk: int, num_ranks: int) -> int:
    """The stage that a rank's chunk is: chunk·P + rank, or rank and then 2P-1-rank on a V.

    On a V the last rank turns round, so that the first rank holds both the first and the last stage
    (arXiv:2401.10241 §6). Raises ValueError for a rank or chunk that does not exist.
    """
    if not 0 <= rank < num_ranks or chunk < 0 or (name in V_SCHEDULES and chunk > 1):
        raise ValueError(f"{name} over {num_ranks} ranks has no chunk {chunk} on rank {rank}")
    if name in V_SCHEDULES and chunk == 1:
        return 2 * num_ranks - 1 - rank
    return chunk * num_ranks + rank


def rank_of(name: ScheduleName, stage: int, num_ranks: int) -> int:
    """The rank that holds a stage."""
    chunk = stage // num_ranks
    return next(rank for rank in range(num_ranks) if stage_of(name, rank, chunk, num_ranks) == stage)


def build_schedule(
    name: ScheduleName, num_ranks: int, num_micro_batches: int, chunks_per_rank: int | None = None
) -> Schedule:
    """The orders of all ranks, equal to those of torch.distributed.pipelining.

    `chunks_per_rank` is 1 for GPipe and 1F1B and 2 for the others unless given. Raises InputError as
    `require_buildable` does. The last few are kept: a large one takes seconds to build.
    """
    require_buildable(name, num_ranks, num_micro_batches, chunks_per_rank)
    chunks = default_chunks(name) if chunks_per_rank is None else chunks_per_rank
    return _built(name, num_ranks, num_micro_batches, chunks)


@lru_cache(maxsize=4)
def _built(name: ScheduleName, num_ranks: int, num_micro_batches: int, chunks: int) -> Schedule:
    ranks = range(num_ranks)
    by_rank = [order_of_rank(name, rank, num_ranks, chunks, num_micro_batches) for rank in ranks]
    if name == "InterleavedZeroBubble":
        by_rank = orders.delay_early_forwards(by_rank)
    return Schedule(
        name=name,
        num_ranks=num_ranks,
        num_stages=num_ranks * chunks,
        num_micro_batches=num_micro_batches,
        stages_of_rank=tuple(
            tuple(stage_of(name, rank, chunk, num_ranks) for chunk in range(chunks)) for rank in ranks
        ),
        orders=tuple(map(tuple, by_rank)),
    )


def order_of_rank(
    name: ScheduleName, rank: int, num_ranks: int, chunks: int, num_micro_batches: int
) -> orders.Order:
    """One rank's order; InterleavedZeroBubble's lacks the idle slots of `orders.delay_early_forwards`."""
    match name:
        case "GPipe":
            return orders.gpipe(rank, num_micro_batches)
        case "1F1B":
            return orders.one_forward_one_backward(rank, num_ranks, num_micro_batches)
        case "Interleaved1F1B":
            return orders.interleaved(rank, num_ranks, chunks, num_micro_batches, zero_bubble=False)
        case "InterleavedZeroBubble":
            return orders.interleaved(rank, num_ranks, chunks, num_micro_batches, zero_bubble=True)
        case "ZBVZeroBubble":
            return orders.zero_bubble_v(rank, num_ranks, num_micro_batches)
        case "DualPipeV":
            return orders.dual_pipe_v(rank, num_ranks, num_micro_batches)


def check(schedule: Schedule) -> None:
    """Raise ValueError, saying where, unless every rank can run its order to the end and all work gets done.

    Every stage sits on one rank; every stage does exactly one forward and one full backward, or an input
    gradient and a weight gradient, of every micro-batch, on its own rank; and no rank waits for ever.
    """
    stages = sorted(stage for held in schedule.stages_of_rank for stage in held)
    if stages != list(range(schedule.num_stages)):
        raise ValueError(f"the ranks hold the stages {stages}, not each of {schedule.num_stages} once")
    if not len(schedule.orders) == len(schedule.stages_of_rank) == schedule.num_ranks:
        raise ValueError(f"there are {len(schedule.orders)} orders for {schedule.num_ranks} ranks")
    seen: Counter[tuple[ActionKind, int, int | None]] = Counter()
    for rank, held in enumerate(schedule.stages_of_rank):
        for action in schedule.actions(rank):
            _check_action(action, rank, held)
            seen.update((part.kind, part.stage, part.micro_batch) for part in action.simple_actions)
    _check_counts(schedule, seen)
    run_in_order(schedule, lambda action: 1.0)


def _check_action(action: Action, rank: int, held: Sequence[int]) -> None:
    if action.kind is ActionKind.OVERLAP:
        if [part.kind for part in action.parts] != [ActionKind.FORWARD, ActionKind.BACKWARD]:
            raise ValueError(f"rank {rank}: {action} is not a forward and a full backward, in that order")
    elif action.parts:
        raise ValueError(f"rank {rank}: {action} has parts but is no overlapped pair")
    for part in action.simple_actions:
        if part.stage not in held:
            raise ValueError(f"rank {rank}: {part} is of a stage that the rank does not hold")


def _check_counts(schedule: Schedule, seen: Counter[tuple[ActionKind, int, int | None]]) -> None:
    full, split = (1, 1, 0, 0), (1, 0, 1, 1)
    kinds = (ActionKind.FORWARD, ActionKind.BACKWARD, ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)
    for stage in range(schedule.num_stages):
        for micro_batch in range(schedule.num_micro_batches):
            counts = tuple(seen.pop((kind, stage, micro_batch), 0) for kind in kinds)
            if counts not in (full, split):
                listed = ", ".join(f"{count} {kind}" for kind, count in zip(kinds, counts, strict=True))
                where = f"stage {stage}, micro-batch {micro_batch}"
                raise ValueError(f"{where}: {listed}; needs one F and one B, or one F, I and W")
    if seen:
        kind, stage, surplus = next(iter(seen))
        raise ValueError(f"stage {stage}, micro-batch {surplus}: {kind} of a micro-batch that does not exist")


def run_in_order(schedule: Schedule, duration: Callable[[Action], float]) -> tuple[tuple[Span, ...], ...]:
    """Start and end of every action, by rank (idle slots left out), if communication took no time.

    Each action starts as soon as its rank is free and its inputs are there: for F the forward one stage
    earlier, for B and I the own forward and the gradient one stage later, for W the own I. What an action
    makes is there when it ends; an overlapped pair starts when the inputs of both parts are there. Designed
    idle slots cost no time. Raises ValueError, naming rank and action, when ranks wait for ever.
    """
    ends: dict[_Event, float] = {}
    waiting: dict[_Event, list[int]] = {}
    remaining = [deque(schedule.actions(rank)) for rank in range(schedule.num_ranks)]
    spans: list[list[Span]] = [[] for _ in remaining]
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        while remaining[rank]:
            action = remaining[rank][0]
            inputs = _inputs(action, schedule.num_stages)
            missing = next((event for event in inputs if event not in ends), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = max([ends[event] for event in inputs], default=0.0)
            if spans[rank]:
                start = max(start, spans[rank][-1][1])
            spans[rank].append((start, start + duration(action)))
            remaining[rank].popleft()
            for event in _outputs(action):
                ends[event] = spans[rank][-1][1]
                runnable.extend(waiting.pop(event, ()))
    for (kind, stage, micro_batch), stuck in waiting.items():
        missing_text = "forward" if kind is ActionKind.FORWARD else "gradient"
        rule = f"the {missing_text} of stage {stage}, micro-batch {micro_batch}, never comes"
        raise ValueError(f"deadlock: rank {stuck[0]} stops at {remaining[stuck[0]][0]}: {rule}")
    return tuple(map(tuple, spans))


def _inputs(action: Action, num_stages: int) -> list[_Event]:
    """What must be done before the action; a gradient is named I, whether a B or an I makes it."""
    events: list[_Event] = []
    for part in action.simple_actions:
        stage, micro_batch = part.stage, part.micro_batch
        if micro_batch is None:
            raise ValueError(f"{action}: an action needs a micro-batch")
        match part.kind:
            case ActionKind.FORWARD:
                if stage > 0:
                    events.append((ActionKind.FORWARD, stage - 1, micro_batch))
            case ActionKind.BACKWARD | ActionKind.INPUT_GRADIENT:
                events.append((ActionKind.FORWARD, stage, micro_batch))
                if stage < num_stages - 1:
                    events.append((ActionKind.INPUT_GRADIENT, stage + 1, micro_batch))
            case _:
                events.append((ActionKind.INPUT_GRADIENT, stage, micro_batch))
    return events


def _outputs(action: Action) -> Iterator[_Event]:
    for part in action.simple_actions:
        if part.micro_batch is None or part.kind is ActionKind.WEIGHT_GRADIENT:
            continue
        kind = ActionKind.FORWARD if part.kind is ActionKind.FORWARD else ActionKind.INPUT_GRADIENT
        yield kind, part.stage, part.micro_batch


def bubble_slots(
    schedule: Schedule, forward: float = 1, input_gradient: float = 1, weight_gradient: float = 1
) -> tuple[float, ...]:
    """The idle fraction of each rank, 0 to 1, over the time from the first start to the last end of any rank.

    The arguments are durations in any one unit, the same for every stage; a full backward takes
    `input_gradient + weight_gradient`, an overlapped pair as long as its parts one after the other: overlap
    hides communication, which costs nothing here. GPipe and 1F1B: (P-1)/(m+P-1) on every rank; interleaved:
    (P-1)/(v·m+P-1) where m is a multiple of P (arXiv:2104.04473 §2.2). Raises ValueError for a deadlock.
    """
    duration_of_kind = {
        ActionKind.FORWARD: forward,
        ActionKind.BACKWARD: input_gradient + weight_gradient,
        ActionKind.INPUT_GRADIENT: input_gradient,
        ActionKind.WEIGHT_GRADIENT: weight_gradient,
    }

    def duration(action: Action) -> float:
        return sum(duration_of_kind[part.kind] for part in action.simple_actions)

    spans = run_in_order(schedule, duration)
    total = max((end for rank_spans in spans for _, end in rank_spans[-1:]), default=0.0)
    if total <= 0:
        return (0.0,) * schedule.num_ranks
    return tuple(1 - sum(end - start for start, end in rank_spans) / total for rank_spans in spans)


def live_at_peak(
    schedule: Schedule, rank: int, forward_bytes: Sequence[int], weight_bytes: Sequence[int]
) -> ActivationPeak:
    """What a rank keeps alive at the high-water mark of its activation bytes, walking its own order.

    By stage: F of one micro-batch adds `forward_bytes`, B removes it, I leaves `weight_bytes` (what the
    deferred weight gradient needs) in its place, W removes that. An overlapped pair adds its forward before
    its backward removes anything. Raises ValueError unless both sequences have one entry per stage.
    """
    if not len(forward_bytes) == len(weight_bytes) == schedule.num_stages:
        raise ValueError(f"bytes are needed for {schedule.num_stages} stages")
    stages = schedule.stages_of_rank[rank]
    chunk_of_stage = {stage: chunk for chunk, stage in enumerate(stages)}
    forward_held, weight_held = [0] * len(stages), [0] * len(stages)
    live_bytes = 0
    peak = ActivationPeak(rank, 0, 0, stages, tuple(forward_held), tuple(weight_held))
    for slot, action in enumerate(schedule.orders[rank]):
        for part in action.simple_actions if action is not None else ():
            forward_change, weight_change = HELD_CHANGES[part.kind]
            chunk = chunk_of_stage[part.stage]
            forward_held[chunk] += forward_change
            weight_held[chunk] += weight_change
            live_bytes += forward_change * forward_bytes[part.stage]
            live_bytes += weight_change * weight_bytes[part.stage]
            if live_bytes > peak.peak_bytes:
                peak = ActivationPeak(rank, slot, live_bytes, stages, tuple(forward_held), tuple(weight_held))
    return peak


def activation_peaks(
    schedule: Schedule, forward_bytes: Sequence[int], weight_bytes: Sequence[int]
) -> tuple[int, ...]:
    """Each rank's high-water mark of live activation bytes; arguments and errors as for `live_at_peak`."""
    ranks = range(schedule.num_ranks)
    return tuple(live_at_peak(schedule, rank, forward_bytes, weight_bytes).peak_bytes for rank in ranks)


def peak_in_flight(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """By rank and chunk, the micro-batches in flight when the rank has most of them.

    In flight is a micro-batch between its forward and its backward (B or I) on that chunk; every chunk weighs
    the same and deferred weight gradients nothing. 1F1B: min(m, P-rank); GPipe: m.
    """
    ones, zeros = [1] * schedule.num_stages, [0] * schedule.num_stages
    return tuple(live_at_peak(schedule, rank, ones, zeros).forward_held for rank in range(schedule.num_ranks))
