"""From actions that have run to the events inside them: parts, hidden transfers, waits and sends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from meshwright.ir.schedule import Action, ActionKind
from meshwright.simulator.ending import Ending, RankStep
from meshwright.simulator.engine import GATHER, Done, Run, lines_of, simple_kinds
from meshwright.simulator.parts import NO_TIER
from meshwright.simulator.passages import Passage
from meshwright.simulator.streams import Flow, Stretch, Trace, work_through
from meshwright.simulator.work import Priced, stretch
from meshwright.timeline import COMPUTE_STREAM, Event, Timeline

LAUNCHES = "launches"
SEND = "send"


class Piece(NamedTuple):
    """One event inside an action, in seconds from any start. `main` says that the rank does nothing else;
    `turn` is which simple action of an overlapped pair it belongs to."""

    kind: str
    axis: str
    tier: int
    name: str
    main: bool
    turn: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class _Line:
    """One passage of an action: its block, which simple action it belongs to, and its numbers."""

    block: str
    turn: int
    passage: Passage
    stretch: Stretch


class Inside:
    """What is inside the actions of one pipeline. Actions with equal prices share their pieces."""

    def __init__(self, priced: Priced, pipeline: int) -> None:
        self.priced, self.pipeline = priced, pipeline
        self._stretches: dict[tuple[ActionKind, int, int], list[Stretch]] = {}
        self._pieces: dict[tuple[object, ...], list[Piece]] = {}
        self._varies = {
            (kind, stage): any(np.ndim(passage.total_s) for passage in passages)
            for kind, stages in priced.passages.items()
            for stage, passages in enumerate(stages)
        }

    def stretches(self, kind: ActionKind, stage: int, micro_batch: int) -> list[Stretch]:
        """What a rank works through for a kind of simple action."""
        key = (kind, stage, micro_batch if self._varies[kind, stage] else -1)
        if key not in self._stretches:
            where = (self.pipeline, micro_batch)
            passages = self.priced.passages[kind][stage]
            self._stretches[key] = [stretch(passage, where) for passage in passages]
        return self._stretches[key]

    def pieces(self, done: Done) -> tuple[list[Piece], float]:
        """The pieces of an action and the second they count from. What shows of sends is left to the end."""
        if done.flows:
            return self._traced(done.action, done.flows), done.start_s
        key = self._key(done.action)
        if key not in self._pieces:
            self._pieces[key] = self._traced(done.action, ())
        return self._pieces[key], done.start_s

    def count(self, done: Done) -> int:
        """How many events an action has: parts, hidden transfers, waits for the host and sends."""
        total = 0
        for action in done.action.simple_actions:
            for kind in simple_kinds(action.kind):
                for passage in self.priced.passages[kind][action.stage]:
                    total += len(passage.parts) + len(passage.hidden) + 1
                sends = self.priced.sends.get(kind)
                total += bool(sends and sends[action.stage])
        return total

    def _key(self, action: Action) -> tuple[object, ...]:
        parts = action.simple_actions
        varies = any(self._varies[kind, part.stage] for part in parts for kind in simple_kinds(part.kind))
        own = tuple((part.kind, part.stage) for part in parts)
        return (own, tuple(part.micro_batch for part in parts) if varies else ())

    def _traced(self, action: Action, flows: tuple[Flow, ...]) -> list[Piece]:
        turns = {(part.kind, part.stage): turn for turn, part in enumerate(action.simple_actions)}

        def lines(kind: ActionKind, stage: int, micro_batch: int) -> list[_Line]:
            turn = turns.get((kind, stage), turns.get((ActionKind.BACKWARD, stage), 0))
            rows = zip(
                self.priced.blocks[kind][stage],
                self.priced.passages[kind][stage],
                self.stretches(kind, stage, micro_batch),
                strict=True,
            )
            return [_Line(block, turn, passage, numbers) for block, passage, numbers in rows]

        found = lines_of(action, lines)
        trace = Trace([], [], [], [])
        beside = [Flow(flow.left_s, flow.tier, flow.key) for flow in flows]
        work_through([line.stretch for line in found], beside, 0.0, trace)
        return [piece for position, line in enumerate(found) for piece in _of_line(line, trace, position)]


def _of_line(line: _Line, trace: Trace, position: int) -> Iterator[Piece]:
    passage, turn = line.passage, line.turn
    again = "again " if passage.phase == "recompute" else ""
    for part, window in zip(passage.parts, trace.pieces[position], strict=True):
        name = f"{line.block} {again}{part.name}"
        yield Piece(part.kind, part.axis or "", part.tier, name, True, turn, *window)
    for hidden, window in zip(passage.hidden, trace.hidden[position], strict=True):
        kind = _kind_of_axis(passage, hidden.axis)
        name = f"{line.block} {hidden.axis} beside compute"
        yield Piece(kind, hidden.axis, hidden.tier, name, False, turn, *window)
    for which, window in trace.left[position]:
        hidden = passage.hidden[which]
        kind = _kind_of_axis(passage, hidden.axis)
        name = f"{line.block} rest of {hidden.axis}"
        yield Piece(kind, hidden.axis, hidden.tier, name, True, turn, *window)
    host = trace.host[position]
    yield Piece(LAUNCHES, "", NO_TIER, f"{line.block} waiting for launches", True, turn, *host)


def _kind_of_axis(passage: Passage, axis: str) -> str:
    return next(part.kind for part in passage.parts if part.axis == axis)


def timeline_of(
    priced: Priced, run: Run, inside: Inside, steps: tuple[RankStep, ...], end: Ending
) -> Timeline:
    """Every event of one pipeline's step, on streams named by axis and link tier."""
    names = [link.name for link in priced.program.plan.cluster.links]
    events: list[Event] = []
    for rank, all_done in enumerate(run.done):
        for done in all_done:
            events += _of_action(rank, done, inside, names)
            events += _of_sends(rank, done, priced, run, names)
        events += _of_step(rank, run, steps[rank], end, names)
    layout = priced.program.plan.layout
    each = layout.tp * layout.cp * layout.dp
    labels = {
        rank: f"pipeline rank {rank}: stages {', '.join(map(str, stages))}; {each} GPUs"
        for rank, stages in enumerate(run.schedule.stages_of_rank)
    }
    beside = {event.stream for event in events if event.stream.endswith(_BESIDE) or _is_send(event.stream)}
    return Timeline(tuple(events), labels, end.total_s, frozenset(beside))


_BESIDE = ", beside compute"
_SENDS = {ActionKind.FORWARD: "pp forward", ActionKind.INPUT_GRADIENT: "pp backward"}


def _is_send(stream: str) -> bool:
    return stream.startswith(tuple(_SENDS.values()))


def stream_of(axis: str, tier: int, main: bool, names: list[str]) -> str:
    """The name of a stream: of compute, of the host, or of an axis on a link tier."""
    if not axis:
        return COMPUTE_STREAM
    return f"{axis}, {names[tier]}" + ("" if main else _BESIDE)


def _of_action(rank: int, done: Done, inside: Inside, names: list[str]) -> Iterator[Event]:
    parts = done.action.simple_actions
    pieces, start = inside.pieces(done)
    for kind, axis, tier, name, main, turn, begins, ends in pieces:
        if ends > begins:
            stream = "host" if kind == LAUNCHES else stream_of(axis, tier, main, names)
            part = parts[turn]
            yield Event(
                rank,
                stream,
                part.kind.value,
                name,
                part.stage,
                -1 if part.micro_batch is None else part.micro_batch,
                axis,
                start + begins,
                start + ends,
            )


def _of_sends(rank: int, done: Done, priced: Priced, run: Run, names: list[str]) -> Iterator[Event]:
    """Each send from when it keeps its rank, or leaves it, to its arrival."""
    for key, part, kind, begins in sends_of(done, priced, run):
        send = priced.sends[kind][part.stage]
        assert send is not None
        assert part.micro_batch is not None
        what = "activations" if kind is ActionKind.FORWARD else "gradients"
        stream = f"{_SENDS[kind]}, {names[send.tier]}"
        name = f"stage {part.stage} sends {what}"
        place = (part.stage, part.micro_batch, "pp")
        yield Event(rank, stream, part.kind.value, name, *place, begins, run.arrived_s[key])


def sends_of(done: Done, priced: Priced, run: Run) -> Iterator[tuple[int, Action, ActionKind, float]]:
    """The sends of an action: key, simple action, kind, and when each begins. Those of an overlapped pair
    keep their rank one after the other."""
    found = []
    for part in done.action.simple_actions:
        if part.kind is ActionKind.WEIGHT_GRADIENT or part.micro_batch is None:
            continue
        forward = part.kind is ActionKind.FORWARD
        kind = ActionKind.FORWARD if forward else ActionKind.INPUT_GRADIENT
        send = priced.sends[kind][part.stage] if kind in priced.sends else None
        if send is not None:
            key = part.stage * run.schedule.num_micro_batches + part.micro_batch
            key += 0 if forward else run.schedule.num_stages * run.schedule.num_micro_batches
            found.append((key, part, kind, send.shown_s))
    begins = done.end_s - sum(shown for *_, shown in found)
    for key, part, kind, shown in found:
        yield key, part, kind, begins
        begins += shown


def _of_step(rank: int, run: Run, step: RankStep, end: Ending, names: list[str]) -> Iterator[Event]:
    data = stream_of("dp", step.tier, True, names) if step.tier >= 0 else "dp"
    yield _once(rank, data, "gathering parameters", "dp", 0.0, step.gather_s)
    for key, (begins, ends) in run.data_s[rank].items():
        name = "gathering parameters" if key == GATHER else "reducing gradients"
        yield _once(rank, data + _BESIDE, name, "dp", begins, ends)
    started, reduced, agreed = end.started_s[rank], end.reduced_s[rank], end.agreed_s[rank]
    yield _once(rank, data, "reducing gradients", "dp", started, reduced)
    scalars = agreed + step.scalars_s
    yield _once(rank, "scalars", "gradient norm, token counts", "dp", agreed, scalars)
    updated = scalars + step.optimizer_s
    yield _once(rank, COMPUTE_STREAM, "optimizer", "", scalars, updated)
    outside = updated + step.outside_s
    yield _once(rank, "host", "outside the model: data, logging", "", updated, outside)


def _once(rank: int, stream: str, op: str, axis: str, start_s: float, end_s: float) -> Event:
    return Event(rank, stream, "step", op, -1, -1, axis, start_s, end_s)


def exposed_of(done: Done, inside: Inside) -> dict[str, float]:
    """Seconds by axis in which an action's rank waits for communication."""
    shown: dict[str, float] = {}
    pieces, _ = inside.pieces(done)
    for piece in pieces:
        if piece.main and piece.axis:
            shown[piece.axis] = shown.get(piece.axis, 0.0) + piece.end_s - piece.start_s
    last = max((piece.end_s for piece in pieces if piece.main), default=0.0)
    waited = done.end_s - done.start_s - last
    return shown | {"pp": max(waited, 0.0)}
