"""From a lowered plan to the work of its pipelines: seconds of every action, and what they are made of.

Equal blocks are priced once. Loads and slowdowns are arrays over samples, so that many draws are priced
together and every action of every sample is one element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np

from meshwright.cost.placement import Group
from meshwright.ir.program import Program
from meshwright.ir.schedule import ActionKind
from meshwright.ir.tasks import Phase
from meshwright.layout import Layout
from meshwright.planner.estimate import Measured, distinct_blocks, measure_program, shown_sends
from meshwright.planner.prices import Prices, prices
from meshwright.planner.times import axis_groups, price_collective
from meshwright.simulator.draws import expert_loads
from meshwright.simulator.engine import Seconds, Send
from meshwright.simulator.options import Options
from meshwright.simulator.parts import PricedPhase, priced_phases, tier_of
from meshwright.simulator.passages import Passage, settle
from meshwright.simulator.streams import Stretch

Array = Any
PHASES_OF: Mapping[ActionKind, tuple[Phase, ...]] = {
    ActionKind.FORWARD: ("forward",),
    ActionKind.INPUT_GRADIENT: ("recompute", "input_gradient"),
    ActionKind.WEIGHT_GRADIENT: ("weight_gradient",),
}


@dataclass(frozen=True)
class Priced:
    """A program priced for some pipelines: draws of one step (samples), or the pipelines of one step (units).

    `passages[kind][stage]` lists what a rank works through, and `blocks[kind][stage]` the block of each;
    their numbers are scalars or arrays of shape (pipelines, micro-batches). `slowdowns[pipeline, pp rank]` is
    that of the slowest rank that one stands for.
    """

    program: Program
    prices: Prices
    measured: Measured
    groups: Mapping[str, Group]
    options: Options
    passages: Mapping[ActionKind, tuple[tuple[Passage, ...], ...]]
    blocks: Mapping[ActionKind, tuple[tuple[str, ...], ...]]
    sends: Mapping[ActionKind, tuple[Send | None, ...]]
    slowdowns: np.ndarray

    @property
    def num_pipelines(self) -> int:
        """Pipelines that were priced."""
        return len(self.slowdowns)

    def seconds(self, pipeline: int) -> dict[ActionKind, Seconds]:
        """Seconds of each kind of action by stage and micro-batch, sends left out."""
        count = self.program.plan.num_micro_batches
        table: dict[ActionKind, Seconds] = {}
        for kind, stages in self.passages.items():
            table[kind] = [
                _row(sum((one.total_s for one in stage), np.float64(0.0)), pipeline, count)
                for stage in stages
            ]
        return table

    def stretches(self, kind: ActionKind, stage: int, micro_batch: int, pipeline: int) -> list[Stretch]:
        """The passages of one action as numbers."""
        where = (pipeline, micro_batch)
        return [stretch(passage, where) for passage in self.passages[kind][stage]]


def _row(values: Array, pipeline: int, count: int) -> list[float]:
    if np.ndim(values) == 0:
        return [float(values)] * count
    row: list[float] = np.broadcast_to(values, (len(values), count))[pipeline].tolist()
    return row


def stretch(passage: Passage, where: tuple[int, int]) -> Stretch:
    """One passage as numbers, of one pipeline and micro-batch."""

    def at(value: Array) -> float:
        return float(value) if np.ndim(value) == 0 else float(value[where])

    return Stretch(
        tuple((at(s), part.tier) for s, part in zip(passage.shown_s, passage.parts, strict=True)),
        tuple((at(hidden.seconds), hidden.tier) for hidden in passage.hidden),
        at(passage.host_s),
        at(passage.total_s),
    )


def coupled_ranks(layout: Layout) -> int:
    """Ranks of a stage that wait for one another inside a micro-batch: the least run of neighbours that holds
    whole groups of tp·cp and of etp·ep."""
    return lcm(layout.tp * layout.cp, layout.etp * layout.ep)


def priced_program(program: Program, options: Options, samples: int = 1) -> Priced:
    """Price a program: `samples` draws of one pipeline, or with `every_rank` each pipeline of a step."""
    plan = program.plan
    stated = options.conditions
    rates = prices(plan.cluster, plan.workload.precision, plan.policy.engine, stated, options.constants)
    length = options.sequence_length or plan.workload.max_sequence_length
    measured = measure_program(program, rates, stated, length)
    groups = axis_groups(plan.cluster, plan.layout.degrees())
    rng = np.random.default_rng(options.seed)
    stage_ranks = plan.layout.tp * plan.layout.cp * plan.layout.dp
    units = stage_ranks // coupled_ranks(plan.layout)
    pipelines = units if options.every_rank else samples
    loads = _loads(rng, program, options, pipelines, length)
    slowdowns = _slowdowns(rng, plan.layout, options, pipelines)
    table = _PassageTable(program, rates, measured, groups, options, loads, slowdowns)
    passages, blocks = _passages(program, table)
    sends = _sends(program, rates, measured, groups, options)
    return Priced(program, rates, measured, groups, options, passages, blocks, sends, slowdowns)


def _loads(
    rng: np.random.Generator, program: Program, options: Options, pipelines: int, length: int
) -> np.ndarray | None:
    """Loads by layer, pipeline and micro-batch; None for the mean of the estimate."""
    if options.imbalance == "mean":
        return None
    plan = program.plan
    routing = plan.workload.routing if options.imbalance == "described" else options.imbalance
    tokens = plan.policy.micro_batch_size * length * plan.layout.ep * plan.layout.etp
    choices = max(tokens // (plan.layout.tp * plan.layout.cp), 1) * (plan.model.num_experts_per_tok or 1)
    size = (pipelines, plan.num_micro_batches)
    return expert_loads(rng, routing, plan.model, plan.layout.ep, size, choices)


def _slowdowns(rng: np.random.Generator, layout: Layout, options: Options, pipelines: int) -> np.ndarray:
    """How much longer compute takes, by pipeline and pipeline rank: the slowest of the ranks that wait for
    one another in every layer sets their pace. One pipeline that stands for all has the slowest of a stage,
    which is never faster than the slowest pipeline.
    """
    together = coupled_ranks(layout) if options.every_rank else layout.tp * layout.cp * layout.dp
    if options.stragglers is None:
        return np.ones((pipelines, layout.pp))
    slowest: np.ndarray = options.stragglers.draw(rng, (pipelines, layout.pp, together)).max(axis=2)
    return slowest


_ByStage = dict[ActionKind, tuple[tuple[Any, ...], ...]]


def _passages(program: Program, table: _PassageTable) -> tuple[_ByStage, _ByStage]:
    """What each stage works through, backward in reverse, and in which blocks; equal passages are one
    object."""
    passages: _ByStage = {}
    blocks: _ByStage = {}
    for kind, phases in PHASES_OF.items():
        stages = []
        for stage in program.stages:
            names = [block.name for block in stage.blocks]
            if kind is not ActionKind.FORWARD:
                names.reverse()
            found = [(name, table.of(name, phase, stage.rank)) for name in names for phase in phases]
            stages.append([(name, passage) for name, passage in found if passage.parts])
        passages[kind] = tuple(tuple(passage for _, passage in stage) for stage in stages)
        blocks[kind] = tuple(tuple(name for name, _ in stage) for stage in stages)
    return passages, blocks


class _PassageTable:
    """Settled passages, each distinct block priced once and settled once for every load and slowdown."""

    def __init__(
        self,
        program: Program,
        rates: Prices,
        measured: Measured,
        groups: Mapping[str, Group],
        options: Options,
        loads: np.ndarray | None,
        slowdowns: np.ndarray,
    ) -> None:
        self.model, self.options, self.loads = program.plan.model, options, loads
        self.slowdowns = slowdowns if np.any(slowdowns != 1.0) else None
        running = measured.running if loads is None else replace(measured.running, load=loads)
        blocks, _ = distinct_blocks(program)
        self.priced: dict[object, dict[Phase, PricedPhase]] = {
            self.kind(block.name): priced_phases(block, kernels, rates, groups, running)
            for block, kernels in zip(blocks, measured.kinds, strict=True)
        }
        self.count = program.plan.num_micro_batches
        self.settled: dict[tuple[object, ...], Passage] = {}

    def kind(self, name: str) -> object:
        return self.model.layer_kind(int(name.split(".")[1])) if name.startswith("layers.") else name

    def of(self, name: str, phase: Phase, rank: int) -> Passage:
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        key = (
            self.kind(name),
            phase,
            layer if self.loads is not None else None,
            rank if self.slowdowns is not None else None,
        )
        if key not in self.settled:
            slowdown = 1.0 if self.slowdowns is None else self.slowdowns[:, rank, None]
            own = self.priced[key[0]][phase]
            if self.loads is not None:
                picked = tuple(s[layer] if np.ndim(s) == 3 else s for s in own.seconds)
                own = replace(own, seconds=picked)
            self.settled[key] = _full(settle(own, slowdown, self.options.contention), self.count)
        return self.settled[key]


def _full(passage: Passage, count: int) -> Passage:
    """The same with every array of shape (pipelines, micro-batches), so that one index finds a number."""
    arrays = (passage.total_s, *passage.shown_s, *(hidden.seconds for hidden in passage.hidden))
    if all(np.ndim(value) == 0 for value in arrays):
        return passage
    shape = np.broadcast_shapes(*(np.shape(value) for value in arrays), (1, count))

    def full(value: Array) -> Array:
        return np.broadcast_to(value, shape)

    hidden = [replace(one, seconds=full(one.seconds), left_s=full(one.left_s)) for one in passage.hidden]
    return replace(
        passage,
        shown_s=tuple(map(full, passage.shown_s)),
        hidden=tuple(hidden),
        host_s=full(passage.host_s),
        total_s=full(passage.total_s),
    )


def _sends(
    program: Program, rates: Prices, measured: Measured, groups: Mapping[str, Group], options: Options
) -> dict[ActionKind, tuple[Send | None, ...]]:
    """Sends by stage: latency and bytes, of which the engine shows a share on the sender."""
    if not options.point_to_point:
        return {}
    shown = shown_sends(rates, program.plan.layout.vpp)
    by_kind: dict[ActionKind, tuple[Send | None, ...]] = {}
    for kind, phase in ((ActionKind.FORWARD, "forward"), (ActionKind.INPUT_GRADIENT, "input_gradient")):
        found: list[Send | None] = []
        for stage in program.stages:
            send = next((task for task in stage.sends if task.phase == phase), None)
            if send is None:
                found.append(None)
                continue
            seconds = float(sum(price_collective(send, rates, groups, measured.running)))
            tier = tier_of(groups[send.axis])
            found.append(Send(shown * seconds, (1 - shown) * seconds, tier))
        by_kind[kind] = tuple(found)
    return by_kind


def rows(priced: Priced, kind: ActionKind, stages: Sequence[int], pipeline: int, micro_batch: int) -> float:
    """Seconds of one kind of action of some stages in one micro-batch, what shows of their sends included."""
    total = 0.0
    for stage in stages:
        for passage in priced.passages[kind][stage]:
            value = passage.total_s
            total += float(value) if np.ndim(value) == 0 else float(value[pipeline, micro_batch])
        send = priced.sends[kind][stage] if kind in priced.sends else None
        total += 0.0 if send is None else send.shown_s
    return total
