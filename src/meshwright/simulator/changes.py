"""What would shorten a step: single changes of a plan that keep every rule and fit, each simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from meshwright.cost.memory import memory, worst
from meshwright.engines import engine_of
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.ir.program import lower
from meshwright.layout import Layout, divisors
from meshwright.plan import Plan, split_layers
from meshwright.policy import CHUNKED_SCHEDULES, V_SCHEDULES, Recompute, ScheduleName
from meshwright.simulator.options import Options
from meshwright.simulator.steady import totals
from meshwright.verify import verify

LEAST = 0.005
"""Share of a step that a change must save to be told."""
Progress = Callable[[str, int, int], None]
Candidate = tuple[str, Plan | None]
"""A change in words, and the plan that it makes; None where its degrees are no layout."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a plan: in words, what a step takes with it and what that saves, in seconds, and the peak
    memory of the fullest rank in bytes."""

    words: str
    step_time_s: float
    saved_s: float
    peak_memory_bytes: int


def changes(plan: Plan, sequence_length: int, progress: Progress | None = None) -> tuple[Change, ...]:
    """The changes that shorten a step at a sequence length by LEAST or more, those that save most first.

    A change turns one thing: a degree by a factor two with dp in exchange, ep and the micro-batch by one
    divisor, or one choice of the policy. Changes that save as much stand in the order of `candidates`.
    """
    now_s = totals(plan, Options(sequence_length=sequence_length)).step_time_s
    asked = [(words, other) for words, other in candidates(plan) if other is not None]
    found = []
    for place, (words, other) in enumerate(asked):
        if progress is not None:
            progress("trying changes", place, len(asked))
        peak = _peak_bytes(other)
        if peak is None:
            continue
        seconds = totals(other, Options(sequence_length=sequence_length)).step_time_s
        if now_s - seconds >= LEAST * now_s:
            found.append(Change(words, seconds, now_s - seconds, peak))
    return tuple(sorted(found, key=lambda change: -change.saved_s))


def _peak_bytes(plan: Plan) -> int | None:
    """Peak memory of a plan that keeps every rule and fits; None for another."""
    if any(finding.level == "error" for finding in verify(plan)):
        return None
    peak = worst(memory(lower(plan))).total_bytes
    return peak if peak <= plan.cluster.gpu.memory else None


def candidates(plan: Plan) -> Iterator[Candidate]:
    """Single changes in words with the plans they make, whether these keep the rules or not."""
    yield from _of_ep(plan)
    yield from _of_degrees(plan)
    yield from _of_micro_batch(plan)
    yield from _of_schedule(plan)
    yield from _of_policy(plan)


def _of_ep(plan: Plan) -> Iterator[Candidate]:
    if not plan.model.is_moe:
        return
    for ep in _beside(plan.layout.ep, divisors(plan.model.num_experts)):
        yield f"EP {ep} instead of {plan.layout.ep}", _with(plan, {"ep": ep})


def _beside(value: int, allowed: list[int]) -> list[int]:
    """The next smaller and the next larger value."""
    smaller, larger = [n for n in allowed if n < value], [n for n in allowed if n > value]
    return [*smaller[-1:], *larger[:1]]


def _of_degrees(plan: Plan) -> Iterator[Candidate]:
    """tp, cp and pp by a factor two, dp in exchange."""
    layout = plan.layout
    for axis in ("tp", "cp", "pp"):
        now = layout.size(axis)
        for degree, dp in ((now // 2, layout.dp * 2), (now * 2, layout.dp // 2)):
            if degree * dp == now * layout.dp:
                words = f"{axis.upper()} {degree} instead of {now} (DP {dp})"
                parallel = degree > 1 if axis == "tp" and now == 1 else plan.policy.sequence_parallel
                other = _with(plan, {axis: degree, "dp": dp})
                yield words, _set(other, sequence_parallel=parallel and (axis != "tp" or degree > 1))


def _of_micro_batch(plan: Plan) -> Iterator[Candidate]:
    now = plan.policy.micro_batch_size
    for size in _beside(now, divisors(plan.workload.global_batch_size // plan.layout.dp)):
        yield f"micro-batch {size} instead of {now}", _set(plan, micro_batch_size=size)


def _of_schedule(plan: Plan) -> Iterator[Candidate]:
    """Other schedules that the engine runs, with as many chunks as they need; other numbers of chunks."""
    policy, vpp = plan.policy, plan.layout.vpp
    if plan.layout.pp == 1:
        return
    names: list[ScheduleName] = [name for name in engine_of(policy).schedules if name != policy.schedule]
    for name in names:
        chunks = chunks_of(name, vpp)
        words = f"{name} instead of {policy.schedule}"
        words += "" if chunks == vpp else f" ({chunks} chunk{'s' if chunks > 1 else ''} a rank)"
        yield words, _set(_with(plan, {"vpp": chunks}), schedule=name)
    if policy.schedule in CHUNKED_SCHEDULES and policy.schedule not in V_SCHEDULES:
        for chunks in (vpp // 2, vpp * 2):
            if chunks > 1:
                yield f"{chunks} chunks a rank instead of {vpp}", _with(plan, {"vpp": chunks})


def chunks_of(schedule: ScheduleName, vpp: int) -> int:
    """Chunks a rank that a schedule gets in place of one with `vpp`: as many if it may, else two or one."""
    if schedule not in CHUNKED_SCHEDULES:
        return 1
    return 2 if schedule in V_SCHEDULES or vpp == 1 else vpp


def _of_policy(plan: Plan) -> Iterator[Candidate]:
    policy, engine = plan.policy, engine_of(plan.policy)
    for level in get_args(Recompute):
        if level != policy.recompute:
            yield f"recompute {level} instead of {policy.recompute}", _set(plan, recompute=level)
    if not plan.model.is_moe or plan.layout.ep == 1:
        return
    for name in engine.dispatchers:
        if name != policy.dispatcher:
            yield f"dispatcher {name} instead of {policy.dispatcher}", _set(plan, dispatcher=name)
    if not policy.expert_overlap:
        yield "the experts' exchange beside compute", _set(plan, expert_overlap=True)


def _with(plan: Plan, degrees: dict[str, int]) -> Plan | None:
    """The plan with other degrees, its layers spread over the stages anew; None where they do not fold, or
    leave a stage without a layer."""
    policy = plan.policy
    try:
        layout = decode(Layout, {**plan.layout.model_dump(), **degrees}, "layout")
        if layout.num_stages != plan.layout.num_stages:
            stages = split_layers(plan.model.num_hidden_layers, layout.num_stages)
            policy = policy.model_copy(update={"layers_per_stage": stages})
    except InputError:
        return None
    return plan.model_copy(update={"layout": layout, "policy": policy})


def _set(plan: Plan | None, **choices: Any) -> Plan | None:
    if plan is None:
        return None
    return plan.model_copy(update={"policy": plan.policy.model_copy(update=choices)})
