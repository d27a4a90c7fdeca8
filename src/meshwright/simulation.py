"""What `meshwright simulate` was asked, and everything that it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meshwright.cost.memory import memory, worst
from meshwright.errors import InputError
from meshwright.ir.program import lower
from meshwright.plan import Plan, split_layers
from meshwright.planner.compare import parse_lengths
from meshwright.planner.interval import interval
from meshwright.planner.planned import planned
from meshwright.policy import SCHEDULES, ScheduleName
from meshwright.simulator.changes import Change, changes, chunks_of
from meshwright.simulator.draws import Spread
from meshwright.simulator.experts import Placement, place_experts
from meshwright.simulator.failures import (
    Recovery,
    Reliability,
    checkpoint_of,
    failure_catalogue,
    failure_rate,
    reliability,
)
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import Sampled, Simulated, sample_steps, simulate
from meshwright.simulator.spares import Spares, spare_nodes
from meshwright.units import SECONDS
from meshwright.verify import require_valid, verify
from meshwright.workload import RoutingCounts

Progress = Callable[[str, int, int], None]
MOST_SAMPLES = 10_000
USUAL_CHECKPOINT = "30 s"
"""For which saving stops training, unless told otherwise; printed with what it leads to."""


@dataclass(frozen=True)
class Asked:
    """The command line of `simulate`."""

    file: str
    overrides: tuple[str, ...] = ()
    lengths: str | None = None
    samples: int | None = None
    stragglers: float | None = None
    seed: int = 0
    every_rank: bool = False
    schedules: bool = False
    place_experts: bool = False
    failures: str | None = None
    checkpoint: str | None = None
    trace: str | None = None
    svg: str | None = None


@dataclass(frozen=True)
class AtLength:
    """A simulated step at one sequence length, and the draws of it where some were asked for."""

    length: int
    step: Simulated
    interval_s: tuple[float, float]
    sampled: Sampled | None

    def document(self, plan: Plan) -> dict[str, Any]:
        """As JSON."""
        step, path = self.step, self.step.critical_path
        draws = {} if self.sampled is None else {"samples": _samples(self.sampled)}
        return {
            "sequence_length": self.length,
            "step_time_s": step.step_time_s,
            "step_time_low_s": self.interval_s[0],
            "step_time_high_s": self.interval_s[1],
            "sequences_per_s": plan.workload.global_batch_size / step.step_time_s,
            "bubble_fraction": step.bubble_fraction,
            "exposed_comm_s": sum(step.exposed_comm_s.values()),
            "exposed_comm_by_axis_s": dict(step.exposed_comm_s),
            "critical_path": [
                {"what": share.words, "seconds": share.seconds, "fraction": share.fraction}
                for share in path.shares
            ],
            "phases_s": {name: list(span) for name, span in step.phases.items()},
            "events": step.events,
            "wall_s": step.wall_s,
            **draws,
        }


@dataclass(frozen=True)
class ScheduleRow:
    """One schedule on the plan's deployment; `refused` says why it cannot run, and then there is no more."""

    schedule: ScheduleName
    vpp: int
    step_time_s: float | None = None
    bubble_fraction: float | None = None
    peak_memory_bytes: int | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Placed:
    """A placement of experts, and the step with experts in order and placed."""

    placement: Placement
    before_s: float
    after_s: float


@dataclass(frozen=True)
class Answer:
    """All that was simulated."""

    plan: Plan
    at: tuple[AtLength, ...]
    changes: tuple[Change, ...] = ()
    schedules: tuple[ScheduleRow, ...] | None = None
    placed: Placed | None = None
    reliability: Reliability | None = None
    spares: Spares | None = None

    @property
    def longest(self) -> AtLength:
        """The step at the longest length."""
        return max(self.at, key=lambda one: one.length)

    def document(self) -> dict[str, Any]:
        """As JSON: the longest length's step, then what else was asked."""
        table = self.plan.cluster.calibration
        priced_by = {"calibration": None if table is None else table.digest}
        beside = self.longest.document(self.plan)
        document = {"plan": self.plan.name, "digest": self.plan.digest, **priced_by, **beside}
        if len(self.at) > 1:
            document["lengths"] = [one.document(self.plan) for one in self.at]
        document["changes"] = [asdict(change) for change in self.changes]
        if self.schedules is not None:
            document["schedules"] = [vars(row) for row in self.schedules]
        if self.placed is not None:
            place = self.placed.placement
            document["experts"] = {
                "load_max_over_mean": {"in_order": place.before, "placed": place.after, "bound": place.bound},
                "step_time_s": {"in_order": self.placed.before_s, "placed": self.placed.after_s},
                "layers": [
                    {"layer": one.layer, "experts_by_rank": [list(own) for own in one.experts_by_rank]}
                    for one in place.layers
                ],
            }
        if self.reliability is not None and self.spares is not None:
            document["failures"] = failures_document(self.reliability, self.spares)
        return document


def answered(asked: Asked, progress: Progress) -> Answer:
    """Simulate what was asked. Raises InputError before anything is simulated that takes long."""
    _check(asked)
    plan = planned(asked.file, asked.overrides, None, progress)
    require_valid(plan)
    lengths = _lengths(asked, plan)
    at = []
    for place, length in enumerate(lengths):
        progress("simulating", place, len(lengths))
        at.append(_at(plan, asked, length))
    longest = max(at, key=lambda one: one.length)
    _write_pictures(asked, longest)
    rate, spares = _failures(asked, plan, longest.step.step_time_s)
    schedules = tuple(_schedules(plan, longest.length, progress)) if asked.schedules else None
    placed = _placed(plan, asked, longest.length) if asked.place_experts else None
    shorter = changes(plan, longest.length, progress)
    return Answer(plan, tuple(at), shorter, schedules, placed, rate, spares)


def _check(asked: Asked) -> None:
    if asked.samples is not None and not 1 <= asked.samples <= MOST_SAMPLES:
        raise InputError("--samples", asked.samples, f"between 1 and {MOST_SAMPLES:,} draws", [100])
    if asked.stragglers is not None:
        Spread(asked.stragglers)
        if asked.samples is None:
            rule = "how much slower ranks are is drawn: say how many draws"
            raise InputError("--samples", "missing", rule, ["--samples 100"])
    if asked.checkpoint is not None and asked.failures is None:
        rule = "how long a checkpoint stops training matters where something fails: say how often"
        raise InputError("--failures", "missing", rule, ["--failures '8 h'"])


def _lengths(asked: Asked, plan: Plan) -> Sequence[int]:
    return parse_lengths(asked.lengths, plan.workload)


def _at(plan: Plan, asked: Asked, length: int) -> AtLength:
    program = lower(plan, length)
    step = simulate(program, Options(sequence_length=length, every_rank=asked.every_rank))
    sampled = None
    if asked.samples is not None:
        spread = None if asked.stragglers is None else Spread(asked.stragglers)
        drawn = Options(sequence_length=length, imbalance="described", stragglers=spread, seed=asked.seed)
        sampled = sample_steps(program, drawn, asked.samples)
    return AtLength(length, step, interval(plan, step.step_time_s), sampled)


def _write_pictures(asked: Asked, at: AtLength) -> None:
    if asked.trace is not None:
        at.step.timeline().to_chrome_trace(asked.trace)
    if asked.svg is not None:
        at.step.timeline().to_svg(asked.svg)


def _schedules(plan: Plan, length: int, progress: Progress) -> Sequence[ScheduleRow]:
    """Every schedule on the plan's degrees, with two chunks for each rank where it needs several."""
    rows = []
    for place, name in enumerate(SCHEDULES):
        progress("comparing schedules", place, len(SCHEDULES))
        rows.append(_schedule_row(plan, name, length))
    return rows


def _schedule_row(plan: Plan, name: ScheduleName, length: int) -> ScheduleRow:
    vpp = chunks_of(name, plan.layout.vpp)
    layout = plan.layout.model_copy(update={"vpp": vpp})
    try:
        stages = split_layers(plan.model.num_hidden_layers, layout.num_stages)
    except InputError as error:
        return ScheduleRow(name, vpp, refused=str(error))
    policy = plan.policy.model_copy(update={"schedule": name, "layers_per_stage": stages})
    other = plan.model_copy(update={"layout": layout, "policy": policy})
    broken = next((finding for finding in verify(other) if finding.level == "error"), None)
    if broken is not None:
        return ScheduleRow(name, vpp, refused=f"{broken.key} {broken.value}: {broken.rule}")
    program = lower(other, length)
    step = simulate(program, Options(sequence_length=length))
    peak = worst(memory(program)).total_bytes
    return ScheduleRow(name, vpp, step.step_time_s, step.bubble_fraction, peak)


def _placed(plan: Plan, asked: Asked, length: int) -> Placed:
    """Experts by their counted loads, and what that does to a step whose routing is drawn from them."""
    counts = plan.workload.routing
    if not isinstance(counts, RoutingCounts):
        rule = "experts are placed by their counted loads: workload.routing needs a histogram"
        raise InputError("--place-experts", "balanced", rule, ["workload.routing: {histogram: loads.csv}"])
    model = plan.model
    placement = place_experts(counts, model.num_experts, plan.layout.ep)
    samples = asked.samples or 20
    program = lower(plan, length)

    def mean_s(routing: RoutingCounts) -> float:
        options = Options(sequence_length=length, imbalance=routing, seed=asked.seed)
        steps = sample_steps(program, options, samples).step_time_s
        return sum(steps) / len(steps)

    return Placed(placement, mean_s(counts), mean_s(_renumbered(counts, placement)))


def _renumbered(counts: RoutingCounts, placement: Placement) -> RoutingCounts:
    """The counts with experts numbered in the order of their new places."""
    places = {
        layer.layer: {expert: place for place, expert in enumerate(layer.permutation)}
        for layer in placement.layers
    }
    tokens = tuple((layer, places[layer][expert], number) for layer, expert, number in counts.tokens)
    return RoutingCounts(tokens=tokens)


def _failures(asked: Asked, plan: Plan, step_s: float) -> tuple[Reliability | None, Spares | None]:
    """Failures at a published rate, or at a mean time between those of the whole job."""
    if asked.failures is None:
        return None, None
    num_gpus, typical = plan.cluster.num_gpus, failure_catalogue().typical
    if asked.failures[:1].isdigit():
        rate = failure_rate(num_gpus, mtbf_s=_seconds("--failures", asked.failures))
    else:
        rate = failure_rate(num_gpus, preset=asked.failures)
    save = checkpoint_of(stall_s=_seconds("--checkpoint", asked.checkpoint or USUAL_CHECKPOINT))
    recovery = Recovery(restart_s=typical.recovery.value)
    spares = spare_nodes(
        rate,
        typical.repair.value,
        gpus_per_node=plan.cluster.gpus_per_node,
        replaced_fraction=typical.replaced.value,
    )
    return reliability(rate, save, recovery, step_s), spares


def _seconds(flag: str, text: str) -> float:
    try:
        return float(SECONDS.parse(text))
    except ValueError as error:
        raise InputError(flag, text, str(error), ["30 s", "8 h"]) from None


def _samples(sampled: Sampled) -> dict[str, float]:
    times = sampled.step_time_s
    return {
        "number": len(times),
        "mean_s": sum(times) / len(times),
        "low_10_s": sampled.quantile(0.1),
        "median_s": sampled.quantile(0.5),
        "high_90_s": sampled.quantile(0.9),
        "wall_s": sampled.wall_s,
    }


def failures_document(found: Reliability, spares: Spares) -> dict[str, Any]:
    """What failures cost, as JSON."""
    chosen = found.chosen
    return {
        "mtbf_s": found.rate.mtbf_s,
        "source": found.rate.source,
        "interval_steps": chosen.interval_steps,
        "interval_s": chosen.interval_s,
        "young_interval_s": found.young[0],
        "daly_interval_s": found.daly[0],
        "effective_fraction": chosen.effective_fraction,
        "lost_work_s": chosen.lost_work_s,
        "spare_nodes": spares.enough.num_spares,
    }
