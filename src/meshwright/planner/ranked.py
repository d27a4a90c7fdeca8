"""One plan with all that is said of it: step time by part, memory by part and stage, interval, confidence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meshwright.cost.memory import RankMemory, memory, worst
from meshwright.ir.program import Program, lower
from meshwright.plan import Plan, Predictions
from meshwright.planner.confidence import Confidence, confidence_of
from meshwright.planner.estimate import StepTime, compose, measure_program, running_of
from meshwright.planner.interval import interval
from meshwright.planner.lengths import Lengths
from meshwright.planner.prices import Conditions, Prices, prices

CONDITIONS = Conditions()
TIGHT = 0.95
"""Share of a GPU's memory above which a plan may not fit after all."""
MEMORY_ERROR = "6 of 53 measured runs took 4 to 7 % more memory than predicted"
"""Why: those of benchmarks/accuracy/training_runs.csv whose memory was measured."""


@dataclass(frozen=True, slots=True)
class SimulatedTime:
    """What a simulated step takes, and the mean idle share of the ranks while micro-batches run."""

    step_time_s: float
    bubble_fraction: float


@dataclass(frozen=True)
class Ranked:
    """A plan, estimated.

    `step` is its estimate and `simulated` what an event-by-event simulation says, both the mean over the
    lengths that it is ranked on; `at_ends` are the simulated step times in seconds at the shortest and the
    longest length, empty where there is one length.
    """

    plan: Plan
    lengths: Lengths
    step: StepTime
    simulated: SimulatedTime
    memory: tuple[RankMemory, ...]
    at_ends: dict[int, float]
    confidence: Confidence

    @property
    def step_time_s(self) -> float:
        """Seconds of a step, simulated."""
        return self.simulated.step_time_s

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of a step by part, which add up to it: those of the estimate, and what the simulation
        finds beyond it (links that several transfers share)."""
        return {**self.step.parts, "simulated": self.step_time_s - self.step.total_s}

    @cached_property
    def interval_s(self) -> tuple[float, float]:
        """The 80 % interval of the step time, in seconds."""
        return interval(self.plan, self.step_time_s)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all GPUs train on per second."""
        return self.sequences_per_s * self.lengths.mean_tokens

    @property
    def sequences_per_s(self) -> float:
        """Sequences that all GPUs train on per second."""
        return self.plan.workload.global_batch_size / self.step_time_s

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the peaks of all GPUs allow in a step."""
        plan = self.plan
        peak = plan.cluster.gpu.peak_flops_per_s(plan.workload.precision) * plan.cluster.num_gpus
        return self.step.model_flops / (self.step_time_s * peak)

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of the pipeline rank that needs most."""
        return worst(self.memory).total_bytes

    @property
    def fits(self) -> bool:
        """Whether the fullest rank fits in a GPU."""
        return self.peak_memory_bytes <= self.plan.cluster.gpu.memory

    @property
    def tight(self) -> bool:
        """Whether it fits by less than predictions of memory have been wrong by."""
        return self.fits and self.peak_memory_bytes > TIGHT * self.plan.cluster.gpu.memory

    def predictions(self) -> Predictions:
        """What the plan's file says of it."""
        low, high = self.interval_s
        return Predictions(
            step_time_s=self.step_time_s,
            step_time_low_s=low,
            step_time_high_s=high,
            tokens_per_s_per_gpu=self.tokens_per_s / self.plan.cluster.num_gpus,
            sequences_per_s=self.sequences_per_s,
            mfu=self.mfu,
            bubble_fraction=self.simulated.bubble_fraction,
            exposed_comm_s=self.step.exposed_comm_s,
            peak_memory_bytes=self.peak_memory_bytes,
        )

    def document(self) -> dict[str, Any]:
        """The plan as JSON: layout, policy and predictions, then details."""
        plan = self.plan
        return {
            "layout": plan.layout.degrees(),
            "policy": plan.policy.model_dump(mode="json"),
            **self.predictions().model_dump(mode="json"),
            "memory_by_stage": [
                {
                    "pp_rank": rank.pp_rank,
                    "stages": list(rank.stages),
                    "total_bytes": rank.total_bytes,
                    "parts": {line.name: line.bytes for line in rank.lines},
                }
                for rank in self.memory
            ],
            "may_run_out_of_memory": self.tight,
            "confidence": self.confidence.document(),
            "estimated_s": self.step.total_s,
            "parts_s": self.parts,
            "step_time_at_s": {str(length): seconds for length, seconds in self.at_ends.items()},
            "num_micro_batches": plan.num_micro_batches,
            "digest": plan.digest,
        }


def ranked(plan: Plan, lengths: Lengths) -> Ranked:
    """Estimate and simulate a plan at every length that it is ranked on, and its memory at the longest."""
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine, CONDITIONS)
    shortest, longest = plan.workload.min_sequence_length, plan.workload.max_sequence_length
    used = {length for length, _ in lengths.shares} | {shortest, longest}
    programs = {length: lower(plan, length) for length in sorted(used)}
    steps = [(_estimated(programs[length], priced, length), share) for length, share in lengths.shares]
    times = {length: simulated_step(program, length) for length, program in programs.items()}
    simulated = mean_simulated([(times[length], share) for length, share in lengths.shares])
    ends = {n: times[n].step_time_s for n in (shortest, longest)} if shortest < longest else {}
    usual = max(lengths.shares, key=lambda pair: (pair[1], pair[0]))[0]
    confidence = confidence_of(programs[usual], priced, running_of(plan, priced, CONDITIONS))
    peaks = memory(programs[longest])
    return Ranked(plan, lengths, mean_step(steps), simulated, peaks, ends, confidence)


def _estimated(program: Program, priced: Prices, length: int) -> StepTime:
    return compose(measure_program(program, priced, CONDITIONS, length), priced)


def simulated_step(plan: Plan | Program, sequence_length: int) -> SimulatedTime:
    """A step of a plan at one length, simulated event by event."""
    from meshwright.simulator.options import Options
    from meshwright.simulator.steady import totals

    found = totals(plan, Options(sequence_length=sequence_length, conditions=CONDITIONS))
    return SimulatedTime(found.step_time_s, found.bubble_fraction)


def mean_simulated(steps: list[tuple[SimulatedTime, float]]) -> SimulatedTime:
    """The mean of simulated steps with shares; of their bubbles, weighed by time."""
    total = sum(share * step.step_time_s for step, share in steps)
    bubble = sum(share * step.step_time_s * step.bubble_fraction for step, share in steps) / total
    return SimulatedTime(total, bubble)


def mean_step(steps: list[tuple[StepTime, float]]) -> StepTime:
    """The mean of step times with shares, part by part."""
    if len(steps) == 1:
        return steps[0][0]
    parts = {part: sum(share * step.parts[part] for step, share in steps) for part in steps[0][0].parts}
    total = sum(share * step.total_s for step, share in steps)
    bubble = sum(share * step.total_s * step.bubble_fraction for step, share in steps) / total
    return StepTime(total, parts, bubble, round(sum(share * step.model_flops for step, share in steps)))
