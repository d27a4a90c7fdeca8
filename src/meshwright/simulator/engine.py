"""A pipeline's micro-batches, event by event, over the action lists of its schedule.

An action starts when its rank is free and its inputs are there: for F the forward one stage earlier, for B
and I the own forward and the gradient one stage later, for W the own I (as `ir/schedule.run_in_order`). What
leaves the rank then takes a send; the share of it that shows keeps the sender, the rest flows beside what
the rank does next. Events are taken in order of time, so that a rank that starts its next action knows which
flows are still under way: with contention they and its own transfers share the links (`streams.py`).

Linear in actions: one entry of the heap for each start and each arrival. What is inside an action with no
flow beside it depends on its price alone, so that equal actions share it: `events.py` lays it out once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

from meshwright.ir.schedule import Action, ActionKind, Schedule
from meshwright.simulator.streams import Flow, Stretch, Window, arrivals, idle, work_through

Seconds = Sequence[Sequence[float]]
"""By stage and micro-batch."""
LineT = TypeVar("LineT")
Lines = Callable[[ActionKind, int, int], Sequence[LineT]]
"""What a rank works through for a kind of simple action, a stage and a micro-batch."""


@dataclass(frozen=True, slots=True)
class Send:
    """A transfer to another stage: seconds that keep the sender, seconds that flow on, and its link tier."""

    shown_s: float
    hidden_s: float
    tier: int


@dataclass(frozen=True, slots=True)
class Beside:
    """Transfers of the data axes beside the micro-batches of one rank, by stage: parameters that are gathered
    beside its first forward, gradients that are reduced beside its last backward."""

    gathers: Mapping[int, Flow] = field(default_factory=dict)
    reductions: Mapping[int, Flow] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What the actions of one pipeline take.

    `seconds` by kind (F, I, W; a full backward is I and W), stage and micro-batch, sends left out. `sends` by
    kind (F, I) and stage, where something leaves the rank. `ready_s` is when each rank may start. With
    `lines`, flows contend with the rank's own transfers; without, nothing does.
    """

    seconds: Mapping[ActionKind, Seconds]
    sends: Mapping[ActionKind, Sequence[Send | None]] = field(default_factory=dict)
    ready_s: Sequence[float] = ()
    beside: Sequence[Beside] = ()
    lines: Lines[Stretch] | None = None


@dataclass(slots=True)
class Done:
    """One action that has run. `cause` is the key of the input that it waited for, −1 for none: it followed
    the rank's action before, or stood first. `flows` are those under way when it started that slowed it."""

    action: Action
    start_s: float
    end_s: float
    cause: int
    flows: tuple[Flow, ...] = ()


@dataclass(frozen=True)
class Run:
    """What ran: actions by rank in order; by key, when each input arrived and who made it (rank and
    position); by rank, from when to when parameters were gathered and gradients reduced beside actions, by
    key GATHER and REDUCTION."""

    schedule: Schedule
    done: tuple[tuple[Done, ...], ...]
    arrived_s: Mapping[int, float]
    made_by: Mapping[int, tuple[int, int]]
    data_s: tuple[Mapping[int, Window], ...]

    @property
    def total_s(self) -> float:
        """When the last action ends."""
        return max((done[-1].end_s for done in self.done if done), default=0.0)

    def drained_s(self, rank: int) -> float:
        """When a rank's gradients that were reduced beside its actions are through: 0 where none were."""
        return self.data_s[rank].get(REDUCTION, (0.0, 0.0))[1]

    def busy_s(self, rank: int) -> float:
        """Seconds that a rank works, waiting for its own communication included."""
        return sum(one.end_s - one.start_s for one in self.done[rank])


GATHER, REDUCTION = -2, -3
"""Keys of what the data axes move beside actions."""
SPLIT = {ActionKind.BACKWARD: (ActionKind.INPUT_GRADIENT, ActionKind.WEIGHT_GRADIENT)}
"""The kinds that a full backward consists of."""


def simple_kinds(kind: ActionKind) -> tuple[ActionKind, ...]:
    """The kinds by which `Work.seconds` knows a simple action."""
    return SPLIT.get(kind, (kind,))


def run(schedule: Schedule, work: Work) -> Run:
    """Run every action of a schedule. Raises ValueError, naming rank and action, when ranks wait for ever."""
    sweep = _Sweep(schedule, work)
    sweep.go()
    return Run(schedule, tuple(map(tuple, sweep.done)), sweep.arrived, sweep.made_by, tuple(sweep.data_s))


class _Sweep:
    """The state of a run. Keys number what actions may wait for: forward of (stage, micro-batch), then its
    gradient. Heap entries are (time, order, rank, kind of entry, payload)."""

    def __init__(self, schedule: Schedule, work: Work) -> None:
        ranks = schedule.num_ranks
        self.schedule, self.work = schedule, work
        self.count = schedule.num_micro_batches
        self.gradients = schedule.num_stages * self.count
        self.actions = [list(schedule.actions(rank)) for rank in range(ranks)]
        self.done: list[list[Done]] = [[] for _ in range(ranks)]
        self.free = list(work.ready_s) or [0.0] * ranks
        self.flows: list[list[Flow]] = [[] for _ in range(ranks)]
        self.as_of = [0.0] * ranks
        self.version = [0] * ranks
        self.data_s: list[dict[int, Window]] = [{} for _ in range(ranks)]
        self.arrived: dict[int, float] = {}
        self.made_by: dict[int, tuple[int, int]] = {}
        self.waiting: dict[int, list[int]] = {}
        self.worked: dict[tuple[object, ...], _Worked] = {}
        self.heap: list[tuple[float, int, int, int]] = []
        self.order = 0

    def go(self) -> None:
        for rank in range(self.schedule.num_ranks):
            self.try_start(rank)
        while self.heap:
            now, _, rank, what = heapq.heappop(self.heap)
            if what == _START:
                self.start(rank, now)
            elif what >= 0:
                self.arrive(what, now)
            elif what == -2 - self.version[rank]:
                self.land(rank, now)
        for key, stuck in self.waiting.items():
            rank = stuck[0]
            kind = "gradient" if key >= self.gradients else "forward"
            stage, micro_batch = divmod(key % self.gradients, self.count)
            rule = f"the {kind} of stage {stage}, micro-batch {micro_batch}, never comes"
            action = self.actions[rank][len(self.done[rank])]
            raise ValueError(f"deadlock: rank {rank} stops at {action}: {rule}")

    def push(self, time: float, rank: int, what: int) -> None:
        """Arrivals stand before starts of the same moment, so that a start knows all that has come."""
        self.order += 1
        order = self.order if what != _START else self.order + _LATER
        heapq.heappush(self.heap, (time, order, rank, what))

    def own_inputs(self, action: Action) -> list[int]:
        """What the rank itself must have made: it is there when that action ends, however long a send takes
        it elsewhere."""
        keys = []
        for part in action.simple_actions:
            assert part.micro_batch is not None
            if part.kind is not ActionKind.FORWARD:
                gradient = self.gradients if part.kind is ActionKind.WEIGHT_GRADIENT else 0
                keys.append(gradient + part.stage * self.count + part.micro_batch)
        return keys

    def inputs(self, action: Action) -> list[int]:
        """What other stages must have sent."""
        keys = []
        for part in action.simple_actions:
            assert part.micro_batch is not None
            own = part.stage * self.count + part.micro_batch
            if part.kind is ActionKind.FORWARD:
                if part.stage:
                    keys.append(own - self.count)
            elif part.kind is not ActionKind.WEIGHT_GRADIENT and part.stage < self.schedule.num_stages - 1:
                keys.append(self.gradients + own + self.count)
        return keys

    def try_start(self, rank: int) -> None:
        """Put the rank's next action on the heap, or wait for the first input that is missing."""
        position = len(self.done[rank])
        if position == len(self.actions[rank]):
            return
        action, start = self.actions[rank][position], self.free[rank]
        for key in self.own_inputs(action):
            if key not in self.made_by:
                self.waiting.setdefault(key, []).append(rank)
                return
        for key in self.inputs(action):
            if key not in self.arrived:
                self.waiting.setdefault(key, []).append(rank)
                return
            start = max(start, self.arrived[key])
        self.push(start, rank, _START)

    def start(self, rank: int, now: float) -> None:
        action, position = self.actions[rank][len(self.done[rank])], len(self.done[rank])
        cause = -1
        if now > self.free[rank]:
            cause = max(self.inputs(action), key=lambda key: self.arrived[key])
        flows = self.flows[rank]
        self.settle_arrivals(rank, idle(flows, self.as_of[rank], now))
        flows += self.released(rank, action, now)
        kept = tuple(Flow(flow.left_s, flow.tier, flow.key) for flow in flows)
        end, shown = now, self.sent(action)
        if flows and self.work.lines is not None:
            end = self.work_beside(rank, self.lines(action), now)
            for _, send in shown:
                if send is not None and send.shown_s:
                    end = self.work_beside(rank, [_sending(send)], end)
        else:
            end += self.seconds(action) + sum(send.shown_s for _, send in shown if send is not None)
            kept = ()
        self.done[rank].append(Done(action, now, end, cause, kept))
        self.free[rank] = self.as_of[rank] = end
        for key, send in shown:
            self.made_by[key] = (rank, position)
            if send is None or not send.hidden_s or self.work.lines is None:
                self.push(end if send is None else end + send.hidden_s, rank, key)
            else:
                flows.append(Flow(send.hidden_s, send.tier, key))
        self.version[rank] += 1
        if flows:
            self.push(min(arrivals(flows, end))[0], rank, -2 - self.version[rank])
        self.try_start(rank)

    def work_beside(self, rank: int, stretches: list[Stretch], now: float) -> float:
        """Work through stretches beside the rank's flows; the end. Equal work beside equal flows goes alike,
        and in a steady state most is equal."""
        flows = self.flows[rank]
        key = (tuple(map(id, stretches)), tuple((flow.left_s, flow.tier) for flow in flows))
        known = self.worked.get(key)
        if known is None:
            moved = [Flow(flow.left_s, flow.tier, place) for place, flow in enumerate(flows)]
            took, arrived = work_through(stretches, moved, 0.0)
            known = _Worked(stretches, took, arrived, [(flow.key, flow.left_s) for flow in moved])
            if len(self.worked) < _KEPT:
                self.worked[key] = known
        keys = [flow.key for flow in flows]
        flows[:] = [Flow(left, flows[place].tier, keys[place]) for place, left in known.left]
        self.settle_arrivals(rank, [(now + after, keys[place]) for after, place in known.arrived])
        return now + known.took_s

    def land(self, rank: int, now: float) -> None:
        """The first of an idle rank's flows is through."""
        flows = self.flows[rank]
        self.settle_arrivals(rank, idle(flows, self.as_of[rank], now))
        self.as_of[rank] = now
        self.version[rank] += 1
        if flows:
            self.push(min(arrivals(flows, now))[0], rank, -2 - self.version[rank])

    def settle_arrivals(self, rank: int, arrived: list[tuple[float, int]]) -> None:
        for time, key in arrived:
            if key >= 0:
                self.push(time, rank, key)
            else:
                began, _ = self.data_s[rank][key]
                self.data_s[rank][key] = (began, time)

    def arrive(self, key: int, now: float) -> None:
        self.arrived[key] = now
        for rank in self.waiting.pop(key, ()):
            self.try_start(rank)

    def released(self, rank: int, action: Action, now: float) -> list[Flow]:
        """Transfers of the data axes that start with an action."""
        if not self.work.beside or self.work.lines is None:
            return []
        beside, flows = self.work.beside[rank], []
        for part in action.simple_actions:
            source: Mapping[int, Flow] = {}
            key = GATHER
            if part.kind is ActionKind.FORWARD and part.micro_batch == 0:
                source = beside.gathers
            elif part.kind in _GRADIENT and part.micro_batch == self.count - 1:
                source, key = beside.reductions, REDUCTION
            if part.stage in source and source[part.stage].left_s > 0:
                flow = source[part.stage]
                flows.append(Flow(flow.left_s, flow.tier, key))
                self.data_s[rank].setdefault(key, (now, now))
        return flows

    def seconds(self, action: Action) -> float:
        total = 0.0
        for part in action.simple_actions:
            assert part.micro_batch is not None
            for kind in simple_kinds(part.kind):
                total += self.work.seconds[kind][part.stage][part.micro_batch]
        return total

    def lines(self, action: Action) -> list[Stretch]:
        assert self.work.lines is not None
        return lines_of(action, self.work.lines)

    def sent(self, action: Action) -> list[tuple[int, Send | None]]:
        """What an action makes for others, by key, with the send that takes it away."""
        made: list[tuple[int, Send | None]] = []
        for part in action.simple_actions:
            if part.kind is ActionKind.WEIGHT_GRADIENT or part.micro_batch is None:
                continue
            key = part.stage * self.count + part.micro_batch
            kind = ActionKind.FORWARD
            if part.kind is not kind:
                key, kind = key + self.gradients, ActionKind.INPUT_GRADIENT
            sends = self.work.sends.get(kind)
            made.append((key, sends[part.stage] if sends else None))
        return made


@dataclass(frozen=True, slots=True)
class _Worked:
    """How work went beside flows: seconds, flows that arrived after how long, and what is left of the others,
    each by its place. `stretches` are kept so that their identities stay theirs."""

    stretches: list[Stretch]
    took_s: float
    arrived: list[tuple[float, int]]
    left: list[tuple[int, float]]


_KEPT = 4096
"""Pieces of work that are remembered: far more than a steady state has, and few where all are drawn."""
_START = -1
_LATER = 1 << 60
_GRADIENT = (ActionKind.BACKWARD, ActionKind.WEIGHT_GRADIENT)


def lines_of(action: Action, lines: Lines[LineT]) -> list[LineT]:
    """The stretches of an action in order; those of an overlapped pair take turns."""
    parts = [_simple_lines(part, lines) for part in action.simple_actions]
    if len(parts) == 1:
        return parts[0]
    longer = max(map(len, parts))
    return [own[turn] for turn in range(longer) for own in parts if turn < len(own)]


def _simple_lines(action: Action, lines: Lines[LineT]) -> list[LineT]:
    assert action.micro_batch is not None
    return [
        stretch
        for kind in simple_kinds(action.kind)
        for stretch in lines(kind, action.stage, action.micro_batch)
    ]


@lru_cache(maxsize=1024)
def _sending(send: Send) -> Stretch:
    return Stretch(((send.shown_s, send.tier),), (), 0.0, send.shown_s)
