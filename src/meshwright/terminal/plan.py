"""Ranked plans on the terminal: the table, where time and memory go, what ties, what was left out and why.

Names, reasons and values may come from a file that somebody else wrote: all pass `printable`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.cost.memory import RankMemory, worst
from meshwright.planner.answer import Answer
from meshwright.planner.explain import Explained, Remedy
from meshwright.planner.ranked import MEMORY_ERROR, Ranked
from meshwright.planner.request import Answered
from meshwright.planner.scaling import AtCount, TargetAnswer
from meshwright.planner.search import MEMORY_STEPS
from meshwright.terminal import printable
from meshwright.terminal.audit import memory_table
from meshwright.terminal.compare import show_comparison
from meshwright.terminal.wording import CHOICE, choice, figures_table, interval
from meshwright.units import BYTES, SECONDS

SHOWN = 10
"""Plans in the table unless told otherwise."""
_REASONS = 6
_UNMEASURED = 5
_ROOM = "Where that is too close, take one that needs less, below."
_PARTS = ("compute", "tp", "cp", "ep", "etp", "dp", "pp", "host", "bubble", "optimizer", "other", "simulated")


def show_plans(result: Answered, console: Console) -> None:
    """Print an answer."""
    answer, shown = result.answer, result.shown or SHOWN
    cluster = answer.space.cluster
    machine = f"{cluster.num_gpus:,} × {printable(cluster.gpu.name)}"
    title = f"{printable(answer.deployment.name)}: {printable(answer.deployment.model.name)} on {machine}"
    console.print(Text(title, style="bold"))
    console.print(_summary(answer))
    if answer.best is None:
        _show_nothing_fits(answer, result.remedies, console)
    else:
        _show_ranking(answer, console, shown)
        _show_parts(answer.plans[: min(shown, 5)], console)
        _show_memory(answer.best, console)
        _show_front(answer, console)
        _show_confidence(answer.best, console)
    _show_rejected(answer, console)
    if result.explained is not None:
        _show_explained(result.explained, console)
    if result.scaling is not None:
        _show_scaling(result.scaling, console)
    if result.target is not None:
        _show_target(result.target, console)
    if result.compared is not None:
        show_comparison(result.compared, console)
    _show_notes(answer, console)


def _summary(answer: Answer) -> str:
    found = answer.found
    taken = f"{answer.wall_s:.1f} s ({answer.cpu_s:.1f} CPU-s)"
    many = "s" if found.legal > 1 else ""
    text = f"{found.legal:,} legal candidate{many} in {taken}: {found.memory_rejected:,} do not fit"
    if not found.feasible:
        return f"{text}, and that is all of them."
    rest = " the others cannot be among the best." if found.priced < found.feasible else ""
    text += f", {found.feasible:,} do; {found.priced:,} priced.{rest}"
    if answer.best is not None and found.within_reach > 1:
        factor = answer.best.confidence.width.factor
        text += (
            f" {found.within_reach:,} tie with the best: its interval is a factor {factor:.2f} either way."
        )
    return text


def _show_ranking(answer: Answer, console: Console, shown: int) -> None:
    console.print()
    ends = list(answer.plans[0].at_ends)
    names = [f"at {length:,}" for length in ends]
    table = figures_table("#", "step", "80 % interval", *names, "tokens/s/GPU", "MFU", "memory", CHOICE)
    tied = set(answer.ties[0]) if answer.ties and 0 in answer.ties[0] else {0}
    for position, ranked in enumerate(answer.plans[:shown]):
        low, high = ranked.interval_s
        table.add_row(
            f"{position + 1}{'=' if position in tied and len(tied) > 1 else ' '}",
            SECONDS.format(ranked.step_time_s),
            interval(low, high),
            *(SECONDS.format(ranked.at_ends[length]) for length in ends),
            f"{ranked.tokens_per_s / ranked.plan.cluster.num_gpus:,.0f}",
            f"{100 * ranked.mfu:.1f}%",
            BYTES.format(ranked.peak_memory_bytes),
            choice(ranked.plan),
        )
    console.print(table)
    legend = "PP4×2: two chunks per rank. I1F1B, IZB: interleaved. rc: recompute, ov: expert overlap."
    ties = "= ties with the first: their intervals overlap. " if len(tied) > 1 else ""
    console.print(Text(ties + legend, style="dim"))


def _show_parts(plans: Sequence[Ranked], console: Console) -> None:
    """Milliseconds of a step by part: compute, exposed communication by axis, and the rest."""
    shown = [part for part in _PARTS if any(abs(plan.parts[part]) > 0.05e-3 for plan in plans)]
    console.print()
    console.print(
        Text("Where the time goes, in ms (communication that nothing hides, by axis)", style="bold")
    )
    table = figures_table("#", *shown)
    for position, plan in enumerate(plans):
        table.add_row(str(position + 1), *(f"{1e3 * plan.parts[part]:,.1f}" for part in shown))
    console.print(table)


def _show_memory(best: Ranked, console: Console) -> None:
    peak, capacity = worst(best.memory), best.plan.cluster.gpu.memory
    console.print()
    share = f"{BYTES.format(peak.total_bytes)} of {BYTES.format(capacity)}"
    console.print(
        Text(f"Memory of the first: pipeline rank {peak.pp_rank} needs most, {share}", style="bold")
    )
    console.print(_without_reasons(best.memory))
    if best.tight:
        taken = 100 * peak.total_bytes / capacity
        text = f"warning: {taken:.1f} % of the GPU is taken, and {MEMORY_ERROR}: it may run out of memory."
        console.print(Text(f"{text} {_ROOM}", style="yellow"))


def _without_reasons(ranks: Sequence[RankMemory]) -> Table:
    table = memory_table(ranks)
    table.columns.pop()
    return table


def _show_front(answer: Answer, console: Console) -> None:
    """The fastest plan at each step of memory."""
    front = answer.found.front
    if len(front) < 2:
        return
    console.print()
    title = f"Less memory, more time (estimated; in {MEMORY_STEPS}ths of the GPU's memory)"
    console.print(Text(title, style="bold"))
    table = figures_table("memory", "step", CHOICE)
    kept = (
        front if len(front) <= SHOWN else [front[i * (len(front) - 1) // (SHOWN - 1)] for i in range(SHOWN)]
    )
    for point in kept:
        plan = answer.space.plan_of(point.candidate)
        table.add_row(
            BYTES.format(point.peak_memory_bytes),
            SECONDS.format(point.step_time_s),
            choice(plan),
        )
    console.print(table)


def _show_confidence(best: Ranked, console: Console) -> None:
    confidence = best.confidence
    shares = ", ".join(f"{100 * share:.0f} % {basis}" for basis, share in confidence.shares.items())
    console.print()
    console.print(
        Text.assemble(
            ("How sure ", "bold"),
            f"{printable(confidence.width.words)}. Prices of the first plan's micro-batch: {shares}.",
        )
    )
    for item in confidence.unmeasured[:_UNMEASURED]:
        console.print(
            f"  {item.basis}: {printable(item.what)}, {100 * item.share_fraction:.1f} % of the seconds"
        )
    more = len(confidence.unmeasured) - _UNMEASURED
    if more > 0:
        console.print(Text(f"  and {more} more: --json lists them all", style="dim"))


def _show_rejected(answer: Answer, console: Console) -> None:
    if not answer.rejected:
        return
    console.print()
    console.print(Text("Left out", style="bold"))
    for reason, count in list(answer.rejected.items())[:_REASONS]:
        console.print(f"  {count:>12,}  {printable(reason)}")


def _show_nothing_fits(answer: Answer, remedies: Sequence[Remedy], console: Console) -> None:
    assert answer.nearest is not None
    near, capacity = answer.nearest, answer.space.cluster.gpu.memory
    missing = BYTES.format(near.peak_memory_bytes - capacity)
    console.print(
        Text.assemble(
            ("Nothing fits. ", "bold red"),
            f"The smallest needs {BYTES.format(near.peak_memory_bytes)} of {BYTES.format(capacity)} per GPU, "
            f"{missing} too much: {choice(near.plan)}.",
        )
    )
    console.print(_without_reasons(near.memory))
    for remedy in remedies:
        console.print(f"  {printable(remedy.change)}: {remedy.feasible:,} candidates fit.")
    if not remedies:
        console.print(
            "  Neither a fixed key left open nor more nodes would help: fewer tokens, or larger GPUs."
        )


def _show_explained(explained: Explained, console: Console) -> None:
    choices = ", ".join(f"{key.partition('.')[2]}={value}" for key, value in explained.choices.items())
    console.print()
    console.print(
        Text.assemble(
            (f"Why not {printable(choices)}: ", "bold"), f"{explained.verdict}. {printable(explained.why)}"
        )
    )
    if explained.plan is not None:
        plan = explained.plan
        console.print(
            f"  its best: {SECONDS.format(plan.step_time_s)}, {BYTES.format(plan.peak_memory_bytes)}, "
            f"{choice(plan.plan)}"
        )
    if explained.by_part_s and explained.verdict == "slower":
        parts = {part: s for part, s in explained.by_part_s.items() if abs(s) > 0.5e-6}
        console.print("  " + ", ".join(f"{part} {1e3 * s:+,.1f} ms" for part, s in parts.items()))


def _show_scaling(rows: Sequence[AtCount], console: Console) -> None:
    console.print()
    console.print(Text("Strong scaling: the same global batch, the best plan at each count", style="bold"))
    table = figures_table("GPUs", "step", "80 % interval", "efficiency", CHOICE)
    for row in rows:
        if row.plan is None:
            table.add_row(f"{row.gpus:,}", "–", "–", "–", printable(row.why))
            continue
        low, high = row.plan.interval_s
        share = row.efficiency_fraction
        table.add_row(
            f"{row.gpus:,}",
            SECONDS.format(row.plan.step_time_s),
            interval(low, high),
            "–" if share is None else f"{100 * share:.1f}%",
            choice(row.plan.plan),
        )
    console.print(table)


def _show_target(answer: TargetAnswer, console: Console) -> None:
    console.print()
    tried = ", ".join(f"{row.gpus:,}" for row in answer.tried)
    if answer.nearest is None or answer.nearest.plan is None:
        text = f"not met: no plan is legal and fits on any count tried ({tried} GPUs)."
        console.print(Text.assemble((f"Target {printable(answer.target.text)}: ", "bold"), text))
        return
    plan, gpus = answer.nearest.plan, answer.nearest.gpus
    value = answer.target.reached(plan)
    shown = SECONDS.format(value) if answer.target.quantity == "step_time" else f"{value:,.4g}"
    words = f"not met; {gpus:,} GPUs come nearest"
    if answer.met:  # on the midpoint of the interval; surely only where its slow end meets it too
        words = f"{'met' if answer.surely else 'likely met'} with {gpus:,} GPUs, the fewest of those tried"
    far = "" if answer.met else f", a factor {answer.target.factor(plan):.3g} away"
    console.print(
        Text.assemble(
            (f"Target {printable(answer.target.text)}: ", "bold"),
            f"{words}: {shown}{far} (80 % interval of the step: {interval(*plan.interval_s)}). "
            f"{choice(plan.plan)}. Tried: {tried} GPUs.",
        )
    )


def _show_notes(answer: Answer, console: Console) -> None:
    """Every value that nobody stated, and every assumption behind the prices."""
    for finding in answer.findings:
        console.print(Text(f"{finding.level}: {printable(str(finding.raised()))}", style="yellow"))
    console.print()
    _show_pairs("taken", answer.defaults, console)
    _show_pairs("assumed", answer.assumptions, console)


def _show_pairs(label: str, pairs: Mapping[str, str], console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold", style="dim")
    for position, (key, why) in enumerate(pairs.items()):
        grid.add_row("" if position else label, Text(printable(key)), Text(printable(why)))
    if pairs:
        console.print(grid)
