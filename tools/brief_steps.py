"""What the brief asks of a step, answered by simulation: for a layout, at each length, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshwright.audit.speed import on_fewer_gpus
from meshwright.ir.program import model_flops
from meshwright.plan import Plan
from meshwright.planner.interval import interval, ratio_factor
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import Simulated, simulate
from meshwright.units import FRACTION, SECONDS, format_count

WIDTH = 96
"""Columns of a timeline."""


@dataclass(frozen=True, slots=True)
class Value:
    """A figure with its 80 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Question:
    """What the document states, whether less is better, and how its unit is written."""

    words: str
    stated: float
    less_is_better: bool
    form: Callable[[float], str]

    def reached(self, found: Value) -> bool | None:
        """Whether a value keeps to what is stated; None where the interval holds both answers."""
        if found.low <= self.stated <= found.high:
            return None
        return (found.value < self.stated) is self.less_is_better

    def cell(self, found: Value) -> str:
        """The value with its interval."""
        return f"{self.form(found.value)} ({self.form(found.low)} to {self.form(found.high)})"


QUESTIONS = (
    Question("0.016 s a step?", 0.016, True, SECONDS.format),
    Question("8,000 sequences/s?", 8000, False, lambda value: format_count(round(value))),
    Question("85 % strong scaling?", 0.85, False, FRACTION.format),
    Question("60 % MFU?", 0.60, False, FRACTION.format),
)


@dataclass(frozen=True)
class Steps:
    """The simulated steps of a plan by sequence length, and of the same plan on fewer GPUs where it can run
    there."""

    name: str
    plan: Plan
    fewer: Plan | None
    by_length: dict[int, Simulated]
    on_fewer: dict[int, Simulated]

    @property
    def lengths(self) -> list[int]:
        """The lengths, ascending."""
        return list(self.by_length)

    def values(self, question: Question) -> list[Value | None]:
        """What answers a question at each length."""
        return [self._value(QUESTIONS.index(question), length) for length in self.lengths]

    def _value(self, question: int, length: int) -> Value | None:
        seconds = self.by_length[length].step_time_s
        low, high = interval(self.plan, seconds)
        match question:
            case 0:
                return Value(seconds, low, high)
            case 1:
                batch = self.plan.workload.global_batch_size
                return Value(batch / seconds, batch / high, batch / low)
            case 2:
                return self._scaling(length)
        ideal = model_flops(self.plan, length) / self.plan.cluster.num_gpus
        ideal /= self.plan.cluster.gpu.peak_flops_per_s(self.plan.workload.precision)
        return Value(ideal / seconds, ideal / high, ideal / low)

    def _scaling(self, length: int) -> Value | None:
        if self.fewer is None:
            return None
        few, every = self.fewer.cluster.num_gpus, self.plan.cluster.num_gpus
        seconds = self.on_fewer[length].step_time_s * few, self.by_length[length].step_time_s * every
        ratio, factor = seconds[0] / seconds[1], ratio_factor(self.plan.model, self.plan.cluster)
        return Value(ratio, ratio / factor, ratio * factor)

    def answer(self, question: Question) -> str:
        """The plain answer over all lengths."""
        pairs = zip(self.lengths, self.values(question), strict=True)
        reached = {n: question.reached(found) if found else None for n, found in pairs}
        if set(reached.values()) == {True}:
            return "**yes**"
        if set(reached.values()) == {False}:
            return "**no**, at every length"
        if set(reached.values()) == {None}:
            return "not decided"
        words = {True: "yes", False: "no", None: "not decided"}
        return "; ".join(
            f"{word} at {', '.join(f'{n:,}' for n, one in reached.items() if one is answer)}"
            for answer, word in words.items()
            if answer in reached.values()
        )

    def picture(self, length: int) -> str:
        """The step at a length as a timeline of characters."""
        return self.by_length[length].timeline().text(WIDTH).rstrip("\n")

    def longest_wait(self, length: int) -> str:
        """The largest share of the critical path, in words."""
        return self.by_length[length].critical_path.words()[0]


def steps_of(name: str, plan: Plan, lengths: Sequence[int]) -> Steps:
    """Simulate a plan at each length, and on a quarter or half of its GPUs."""
    fewer = on_fewer_gpus(plan)
    return Steps(name, plan, fewer, _simulated(plan, lengths), _simulated(fewer, lengths) if fewer else {})


def _simulated(plan: Plan, lengths: Sequence[int]) -> dict[int, Simulated]:
    return {length: simulate(plan, Options(sequence_length=length)) for length in lengths}
