"""The audit: every stated figure against what the description gives, and layouts that can exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isclose
from typing import Any, get_args

from meshwright.audit.answer import Answer, AtLength, Value, Verdict
from meshwright.audit.arithmetic import evaluate
from meshwright.audit.context import Context, context_of, with_repairs
from meshwright.audit.figures import FigureKind, figure_kind
from meshwright.audit.repair import Repair
from meshwright.audit.rounding import half_last_digit
from meshwright.claims import MAX_FIGURES, Figure
from meshwright.cluster import Cluster
from meshwright.cost.memory import RankMemory, memory, worst
from meshwright.deployment import Deployment
from meshwright.engines import engine_named
from meshwright.errors import InputError
from meshwright.ir.parameters import ParameterCounts
from meshwright.ir.program import lower
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.units import BYTES
from meshwright.verify import Finding, stage_findings, verify

RELATIVE_TOLERANCE = 0.005
"""Two values are the same figure within half a per cent, or within half of the last digit that is printed."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One figure with its verdict. Values are SI numbers; `computed` None means undetermined.

    `formula_value` is what the document's own formula gives where that is not the stated value; it then
    stands as `computed` too, because the figure is refuted by its own arithmetic. `by_length` is what follows
    from a step time at several sequence lengths; `computed` is then that at the figure's own, or the longest.
    """

    figure: Figure
    kind: FigureKind
    stated: Value
    computed: Value | None
    verdict: Verdict
    formula: str
    why: str
    formula_value: float | None = None
    by_length: tuple[AtLength, ...] = ()

    def document(self) -> dict[str, Any]:
        """The verdict as JSON keys of `audit`."""
        return {
            "id": self.figure.id,
            "stated": list(self.stated) if isinstance(self.stated, tuple) else self.stated,
            "computed": list(self.computed) if isinstance(self.computed, tuple) else self.computed,
            "computed_by_length": [at.document() for at in self.by_length],
            "unit": self.kind.unit,
            "verdict": self.verdict,
            "why": self.why,
            "formula": self.formula,
            "stated_formula": self.figure.formula,
            "stated_formula_value": self.formula_value,
            "at": self.figure.at.model_dump(exclude_none=True),
            "where": self.figure.where,
        }


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Everything that an audit found."""

    name: str
    title: str
    claims: tuple[Checked, ...]
    broken_rules: tuple[Finding, ...]
    stated_layout: Mapping[str, int]
    nearest_layouts: tuple[Repair, ...]
    parameters: ParameterCounts
    model: Model
    cluster: Cluster
    memory: tuple[RankMemory, ...]
    memory_words: str
    findings: tuple[Finding, ...]
    defaults: Mapping[str, str]
    assumptions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether the stated layout can exist on the cluster."""
        return not self.broken_rules

    @property
    def holds(self) -> bool:
        """Whether the layout is possible, no rule is broken and no figure fails."""
        broken = any(finding.level == "error" for finding in self.findings)
        return self.possible and not broken and all(c.verdict != "fails" for c in self.claims)

    def counts(self) -> dict[Verdict, int]:
        """How many figures have each verdict."""
        verdicts = [checked.verdict for checked in self.claims]
        return {verdict: verdicts.count(verdict) for verdict in get_args(Verdict)}

    def document(self) -> dict[str, Any]:
        """The report as the JSON document of `audit`."""
        counts = self.parameters
        return {
            "name": self.name,
            "claims": [checked.document() for checked in self.claims],
            "layout": {
                "stated": dict(self.stated_layout),
                "possible": self.possible,
                "broken_rules": [_finding_document(finding) for finding in self.broken_rules],
            },
            "nearest_layouts": [repair.document() for repair in self.nearest_layouts],
            "parameters": {"total": counts.total, "active": counts.active, "by_part": counts.by_part},
            "memory_by_stage": [_memory_document(rank) for rank in self.memory],
            "findings": [_finding_document(finding) for finding in self.findings],
            "notes": list(self.notes),
            "defaults": dict(self.defaults),
            "assumptions": dict(self.assumptions),
        }


def _finding_document(finding: Finding) -> dict[str, Any]:
    return {
        "key": finding.key,
        "value": finding.value,
        "rule": finding.rule,
        "nearest": list(finding.nearest),
        "level": finding.level,
    }


def _memory_document(rank: RankMemory) -> dict[str, Any]:
    return {
        "pp_rank": rank.pp_rank,
        "total_bytes": rank.total_bytes,
        "micro_batches_in_flight": rank.num_in_flight,
        "lines": [{"name": n.name, "bytes": n.bytes, "why": n.why, "assumed": n.assumed} for n in rank.lines],
    }


def audit(deployment: Deployment) -> AuditReport:
    """Hold every figure of a deployment against its description.

    An impossible layout is a finding, never an error. Raises InputError for a figure that cannot be read.
    """
    stated = context_of(deployment)
    figures = stated.claims.figures
    if len(figures) > MAX_FIGURES:
        raise InputError("claims.figures", len(figures), f"at most {MAX_FIGURES} figures")
    ctx = with_repairs(stated, _kept_figures(stated))
    ranks: tuple[RankMemory, ...] = ()
    with suppress(InputError):  # no layout, or stages and a schedule that cannot be built: findings say so
        ranks = ctx.memory_for(WHOLE)
    return AuditReport(
        name=deployment.name,
        title=ctx.claims.document or deployment.name,
        claims=tuple(check(ctx, figure) for figure in figures),
        broken_rules=ctx.broken_rules,
        stated_layout=ctx.stated,
        nearest_layouts=tuple(_with_memory(ctx, repair) for repair in ctx.repairs),
        parameters=ctx.parameters,
        model=deployment.model,
        cluster=ctx.cluster,
        memory=ranks,
        memory_words=_memory_words(ctx),
        findings=tuple(_findings(ctx, ranks)),
        defaults=ctx.defaults,
        assumptions=ctx.claims.assumptions,
        notes=tuple(_notes(ctx)),
    )


WHOLE = Figure(id="total_memory", value="1 B")
"""The figure that speaks of the whole deployment at its longest sequence."""


def _memory_words(ctx: Context) -> str:
    if ctx.layout is None:
        return ""
    which = "the stated layout" if ctx.possible else "the nearest possible layout"
    size, length = ctx.plan_on(ctx.layout).policy.micro_batch_size, ctx.workload.max_sequence_length
    return f"{which}, {ctx.layout_words}, micro-batch {size} at {length:,} tokens"


def _findings(ctx: Context, ranks: tuple[RankMemory, ...]) -> Iterator[Finding]:
    """Rules that the plan on the stated or nearest layout breaks, memory included."""
    if ctx.layout is None:
        return
    yield from verify(ctx.plan_on(ctx.layout))
    capacity = ctx.cluster.gpu.memory
    peak = worst(ranks).total_bytes if ranks else 0
    if peak > capacity:
        rule = f"the fullest GPU needs {BYTES.format(peak)}, {BYTES.format(peak - capacity)} more than it has"
        yield Finding("cluster.gpu.memory", BYTES.format(capacity), rule)


def _notes(ctx: Context) -> Iterator[str]:
    """What somebody who reads the report should know: claims that stand before the file's own layout, and
    assumptions about the engine that no line of memory names."""
    claimed = ctx.claims.layout.model_dump()
    if ctx.layout is not None:
        name = ctx.plan_on(ctx.layout).policy.engine
        for fact, why in engine_named(name).assumptions().items():
            if fact not in ("context", "slack"):  # which are lines of their own
                yield f"{name} engine, {fact}: {why}"
    for axis, size in ctx.deployment.layout.model_dump().items():
        if size is not None and claimed[axis] not in (None, size):
            yield f"claims.layout.{axis} {claimed[axis]} is audited; layout.{axis} {size} stands aside"


DEGREE_FIGURES = {
    "layers_per_stage": "pp",
    "stage_ranks": "pp",
    "bubble_fraction": "pp",
    "experts_per_gpu": "ep",
    "hidden_per_tp_rank": "tp",
    "heads_per_tp_rank": "tp",
    "sequences_per_replica": "dp",
    "micro_batch_size": "dp",
}
"""Figures that one degree decides: a layout that keeps the degree keeps them true."""


def _kept_figures(ctx: Context) -> Callable[[Layout], int]:
    """How many of the document's true figures stay true on another layout."""
    deciding = [f for f in ctx.claims.figures if f.id in DEGREE_FIGURES]
    true = [DEGREE_FIGURES[f.id] for f in deciding if check(ctx, f).verdict == "holds"]
    return lambda layout: sum(ctx.stated[axis] == layout.size(axis) for axis in true)


def _with_memory(ctx: Context, repair: Repair) -> Repair:
    """The repair with the micro-batch and the peak memory of its fullest GPU, where its rules hold."""
    plan = ctx.plan_on(repair.layout)
    found = replace(repair, micro_batch_size=plan.policy.micro_batch_size)
    with suppress(InputError):
        for finding in stage_findings(plan.model, plan.layout, plan.policy):
            raise finding.raised()
        peak = worst(memory(lower(plan))).total_bytes
        return replace(found, peak_memory_bytes=peak, fits=peak <= ctx.cluster.gpu.memory)
    return found


def check(ctx: Context, figure: Figure) -> Checked:
    """One figure's verdict.

    It fails when its own formula does not give its value; else the description decides. What follows from the
    step-time model holds inside the 80 % interval of every length that the figure speaks of, fails outside
    all of them or where a bound rules it out, and is undetermined in between.
    """
    kind = figure_kind(figure)
    stated = kind.parse(figure)
    try:
        answer = kind.answer(ctx, figure)
    except InputError as error:  # a rule that the description breaks leaves the figure open
        answer = Answer(None, "", f"It cannot be computed: {error}.")
    if figure.formula is not None and isinstance(stated, float):
        own = evaluate(figure.formula, f"claims.figures.{figure.id}.formula")
        if not _same(stated, own, figure, kind):
            why = f"{figure.formula} is {kind.format(own)}, not {kind.format(stated)}. {answer.why}"
            return Checked(figure, kind, stated, own, "fails", answer.formula, why, own, answer.by_length)
    verdict = _verdict(answer, stated, figure, kind)
    return Checked(
        figure,
        kind,
        stated,
        answer.value,
        verdict,
        answer.formula,
        answer.why,
        by_length=answer.by_length,
    )


def _verdict(answer: Answer, stated: Value, figure: Figure, kind: FigureKind) -> Verdict:
    if answer.impossible:
        return "fails"
    if answer.verdict is not None:
        return answer.verdict
    if answer.value is None:
        return "undetermined"
    if isinstance(stated, tuple) or isinstance(answer.value, tuple):
        return "holds" if stated == answer.value else "fails"
    return "holds" if _same(stated, answer.value, figure, kind) else "fails"


def _same(stated: float, computed: float, figure: Figure, kind: FigureKind) -> bool:
    """Whether two values are one figure: equal counts, or equal within tolerance and printed digits."""
    if kind.exact:
        return isclose(stated, computed, rel_tol=1e-9)
    allowed = (figure.tolerance or RELATIVE_TOLERANCE) * abs(computed)
    return abs(stated - computed) <= max(allowed, half_last_digit(figure, stated)) * (1 + 1e-9)
