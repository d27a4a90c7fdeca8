"""A dry run for people: whose step was run, where memory goes, what is sent, and the checks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.dryrun.answer import Answer, RankRow, collectives
from meshwright.dryrun.checks import Check
from meshwright.ir.observed import Peak
from meshwright.terminal import printable
from meshwright.units import BYTES, format_count

_COLLECTIVES = "collectives of a step: how many, bytes of all"
MOST_ROWS = 16
"""Ranks that the tables list."""
MOST_COLUMNS = 4
"""Ranks that stand beside one another in the table of collectives."""


def show_dry_run(answer: Answer, console: Console) -> None:
    """Print what ranks hold and do, and the checks with their worst deviation."""
    plan, layout = answer.plan, answer.plan.layout
    degrees = " ".join(f"{name}{size}" for name, size in layout.degrees().items() if size > 1)
    title = f"{printable(plan.name)}: {degrees or 'one rank'}, {plan.policy.schedule}"
    console.print(Text(f"{title}, ZeRO {plan.policy.zero_stage}, {plan.workload.precision}", "bold"))
    if plan.defaults:
        console.print("defaults: " + "; ".join(f"{k} {printable(why)}" for k, why in plan.defaults.items()))
    console.print("; ".join(answer.notes.values()))
    console.print()
    console.print(_ranks(answer))
    console.print(_memory(answer))
    console.print(_fullest(answer))
    console.print(_collectives(answer))
    console.print(_checks(answer.checks))
    said = _verdict(answer.checks)
    console.print(f"{len(answer.rows)} ranks, {len(answer.run)} whole steps, {answer.wall_s:.0f} s: {said}")


def _verdict(checks: Sequence[Check]) -> str:
    wrong = [check.name for check in checks if check.holds is False]
    left = [check.name for check in checks if check.holds is None]
    said = f"does not hold: {', '.join(wrong)}" if wrong else f"every check {'run ' if left else ''}holds"
    return f"{said}; not run: {', '.join(left)}" if left else said


def _ranks(answer: Answer) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="whole steps", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("stands for", justify="right")
    table.add_column("layers")
    for name in ("parameters", "in bytes", "peak", "while building", "TFLOP"):
        table.add_column(name, justify="right")
    for row in answer.run[:MOST_ROWS]:
        conduct, peak = row.step.conduct, row.step.peak
        same = sum(1 for other in answer.rows if other.same_as == row.facts.rank)
        table.add_row(
            str(row.facts.rank),
            f"{same + 1} ranks" if same else "itself",
            _layers(row),
            format_count(sum(held.elements for held in conduct.parameters)),
            BYTES.format(conduct.parameter_bytes),
            "failed" if peak is None else BYTES.format(peak.bytes),
            BYTES.format(row.step.build_bytes),
            f"{conduct.work.total / 1e12:,.2f}",
        )
    return _cut(table, len(answer.run) - MOST_ROWS)


def _layers(row: RankRow) -> str:
    parts = []
    for stage in row.step.conduct.stages:
        parts += ["embedding"] if stage.has_embedding else []
        parts += [f"{stage.layers[0]}–{stage.layers[-1]}"] if stage.layers else []
        parts += ["head"] if stage.has_head else []
    return ", ".join(parts)


def _memory(answer: Answer) -> Table:
    """Where a rank's memory is at its fullest moment, beside what the memory model says."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="peak memory", title_justify="left")
    table.add_column("rank", justify="right")
    ended = _ended(answer)
    for name in (*(ended[0][1].by_class if ended else ()), "model", "off"):
        table.add_column(name, justify="right")
    table.add_column("moment")
    for row, peak in ended[:MOST_ROWS]:
        sizes = [BYTES.format(size) for size in peak.by_class.values()]
        off = f"{row.model_bytes / peak.bytes - 1:+.1%}"
        table.add_row(str(row.facts.rank), *sizes, BYTES.format(row.model_bytes), off, peak.moment)
    return _cut(table, len(ended) - MOST_ROWS)


def _cut(table: Table, more: int) -> Table:
    """With a line that says how many ranks are not in it."""
    if more > 0:
        table.caption, table.caption_justify = f"… and {more:,} more; --json has all", "left"
    return table


def _ended(answer: Answer) -> list[tuple[RankRow, Peak]]:
    """The ranks whose whole step ran to its end."""
    return [(row, row.step.peak) for row in answer.run if row.step.peak is not None]


def _fullest(answer: Answer) -> str:
    """One sentence on the rank that needs most, and one on whether it fits."""
    ended = _ended(answer)
    if not ended:
        return "no step ran to its end\n"
    row, peak = max(ended, key=lambda one: one[1].bytes)
    fits = next((check for check in answer.checks if check.name == "fits"), None)
    verdict = "" if fits is None else f"{'fits' if fits.holds else 'does not fit'}: {fits.why}\n"
    return (
        f"rank {row.facts.rank} needs most: {BYTES.format(peak.bytes)} of tensors; {_largest(peak)}, "
        f"in the {peak.moment}\n{verdict}"
    )


def _largest(peak: Peak) -> str:
    name, size = max(peak.by_class.items(), key=lambda item: item[1])
    return f"most of it {name}, {size / peak.bytes:.0%}" if peak.bytes else "nothing"


def _collectives(answer: Answer) -> Table:
    """What a step sends on each axis, by rank."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=_COLLECTIVES, title_justify="left")
    table.add_column("axis")
    table.add_column("kind")
    shown = answer.run[:MOST_COLUMNS]
    for row in shown:
        table.add_column(f"rank {row.facts.rank}", justify="right")
    found: dict[tuple[str, str], dict[int, tuple[int, int]]] = defaultdict(dict)
    for row in shown:
        for call in collectives(row.step.conduct):
            place = found[call["axis"], call["kind"]]
            count, size = place.get(row.facts.rank, (0, 0))
            more = call["count"] * call["bytes"]
            place[row.facts.rank] = count + call["count"], size + more
    for (axis, kind), by_rank in sorted(found.items()):
        cells = [by_rank.get(row.facts.rank, (0, 0)) for row in shown]
        table.add_row(axis, kind, *(f"{n:,}, {BYTES.format(size)}" if n else "–" for n, size in cells))
    return _cut(table, len(answer.run) - MOST_COLUMNS)


def _checks(checks: Sequence[Check]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="checks", title_justify="left")
    table.add_column("check")
    table.add_column("holds")
    table.add_column("worst", justify="right")
    table.add_column("where")
    for check in checks:
        is_share = check.unit.startswith("fraction")
        worst = f"{check.worst:.2%}" if is_share else f"{check.worst:,.0f} {check.unit}"
        holds = {True: "yes", False: "NO", None: "not run"}[check.holds]
        table.add_row(check.name, holds, "–" if check.holds is None else worst, printable(check.why))
    return table
