"""An audit on the terminal: what fails and why first, then what is open, what holds, and what can exist."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.audit import AuditReport, Checked
from meshwright.cost.memory import RankMemory
from meshwright.units import BYTES, format_count

MARKS = {"fails": ("✗", "red"), "undetermined": ("?", "yellow"), "holds": ("✓", "green")}


def show_audit(report: AuditReport, console: Console, full: bool = False) -> None:
    """Print a report in one screen; `full` adds every formula, place, memory line and reason."""
    console.print(Text(report.title, style="bold"))
    _show_summary(report, console)
    if full:
        _show_every_figure(report, console)
    else:
        for verdict in ("fails", "undetermined"):
            _show_reasons([c for c in report.claims if c.verdict == verdict], console)
        _show_names([c for c in report.claims if c.verdict == "holds"], console)
    _show_findings(report, console)
    _show_layouts(report, console)
    _show_memory(report, console, full)
    _show_open(report, console, full)


def _show_summary(report: AuditReport, console: Console) -> None:
    model, counts = report.model, report.parameters
    kind = f"{model.num_experts} experts, top {model.num_experts_per_tok}" if model.is_moe else "dense"
    console.print(
        f"{report.cluster.num_gpus} GPUs · {format_count(counts.total)} parameters, "
        f"{format_count(counts.active)} active · {model.num_hidden_layers} layers, {kind}"
    )
    if report.claims:
        counted = report.counts()
        console.print(
            f"{len(report.claims)} stated figures: {counted['holds']} hold, {counted['fails']} fail, "
            f"{counted['undetermined']} undetermined"
        )


def _grouped(claims: Iterable[Checked]) -> list[tuple[Checked, int]]:
    """Equal statements once, with how often the document makes them."""
    groups: dict[tuple[object, ...], tuple[Checked, int]] = {}
    for checked in claims:
        key = (checked.figure.id, checked.stated, checked.computed, checked.verdict)
        first, count = groups.get(key, (checked, 0))
        groups[key] = (first, count + 1)
    return list(groups.values())


def _times(count: int) -> str:
    return f" (x{count})" if count > 1 else ""


def _show_reasons(claims: Sequence[Checked], console: Console) -> None:
    for checked, count in _grouped(claims):
        console.print(_reason(checked, _times(count)))


def _reason(checked: Checked, times: str = "") -> Text:
    mark, colour = MARKS[checked.verdict]
    differs = checked.computed is not None and checked.verdict != "holds"
    computed = f" -> {_computed(checked)}" if differs else ""
    return Text.assemble(
        (f"{mark} {checked.figure.id}", f"bold {colour}"),
        (f" {checked.kind.format(checked.stated)}{computed}{times}: ", "bold"),
        checked.why,
    )


def _computed(checked: Checked) -> str:
    return "-" if checked.computed is None else checked.kind.format(checked.computed)


def _show_names(claims: Sequence[Checked], console: Console) -> None:
    if not claims:
        return
    words = [f"{c.figure.id} {c.kind.format(c.stated)}{_times(n)}" for c, n in _grouped(claims)]
    console.print(Text.assemble(("✓ ", "bold green"), ("holds: ", "bold"), ", ".join(words) + "."))


def _show_every_figure(report: AuditReport, console: Console) -> None:
    """Each figure in the document's order with its reason, our formula, the document's own and its place."""
    for checked in report.claims:
        console.print(_reason(checked))
        details = [f"ours: {checked.formula}"]
        if checked.figure.formula:
            details.append(f"the document's: {checked.figure.formula}")
        if checked.figure.where:
            details.append(f"in: {checked.figure.where}")
        console.print(Text("    " + " · ".join(details), style="dim"))


def _show_findings(report: AuditReport, console: Console) -> None:
    for finding in report.findings:
        colour = "red" if finding.level == "error" else "yellow"
        console.print(
            Text.assemble(
                (f"{'✗' if finding.level == 'error' else '!'} {finding.key} ", f"bold {colour}"),
                f"{finding.value}: {finding.rule}",
            )
        )


def _show_layouts(report: AuditReport, console: Console) -> None:
    stated = " ".join(f"{a.upper()}{report.stated_layout[a]}" for a in ("tp", "pp", "dp", "ep"))
    if report.possible:
        console.print(
            Text.assemble(("Layout ", "bold"), f"{stated} can exist on these {report.cluster.num_gpus} GPUs.")
        )
        return
    console.print(
        Text.assemble(("Layout ", "bold"), f"{stated} cannot exist on {report.cluster.num_gpus} GPUs:")
    )
    for finding in report.broken_rules:
        console.print(Text.assemble((f"  {finding.key} {finding.value}: ", "red"), finding.rule + "."))
    if not report.nearest_layouts:
        console.print("No other layout of this model and batch can exist there either.")
        return
    console.print("Nearest that can exist:")
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in ("  TP", "CP", "PP", "DP", "EP", "ETP", "EDP", "changes", "figures kept", "fullest GPU"):
        table.add_column(heading, justify="left" if heading == "changes" else "right")
    for repair in report.nearest_layouts:
        layout = repair.layout
        sizes = [str(layout.size(axis)) for axis in ("tp", "cp", "pp", "dp", "ep", "etp", "edp")]
        changes = ", ".join(f"{axis.upper()} {old} -> {new}" for axis, (old, new) in repair.changes.items())
        peak = "-" if repair.peak_memory_bytes is None else BYTES.format(repair.peak_memory_bytes)
        table.add_row(
            *sizes, changes, str(repair.kept_figures), peak if repair.fits is not False else f"{peak} !"
        )
    console.print(table)


def _show_memory(report: AuditReport, console: Console, full: bool) -> None:
    if not report.memory:
        return
    peak = max(report.memory, key=lambda rank: rank.total_bytes)
    capacity = report.cluster.gpu.memory
    share = peak.total_bytes / capacity
    fits = "fits" if share <= 1 else "DOES NOT FIT"
    console.print(
        Text.assemble(
            ("Memory ", "bold"),
            f"of {report.memory_words}: pipeline rank {peak.pp_rank} needs most, "
            f"{BYTES.format(peak.total_bytes)} of {BYTES.format(capacity)} ({100 * share:.3g} %, {fits}).",
        )
    )
    if full:
        console.print(_memory_table(report.memory))


def _memory_table(ranks: Sequence[RankMemory]) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("  part")
    shown = ranks if len(ranks) <= 8 else [ranks[0], ranks[1], ranks[len(ranks) // 2], ranks[-1]]
    for rank in shown:
        table.add_column(f"rank {rank.pp_rank}", justify="right")
    table.add_column("why")
    names = dict.fromkeys(line.name for rank in shown for line in rank.lines)
    for name in names:
        why = next(line.why for rank in shown for line in rank.lines if line.name == name)
        table.add_row(f"  {name}", *[BYTES.format(rank.line(name)) for rank in shown], why)
    table.add_row("  total", *[BYTES.format(rank.total_bytes) for rank in shown], "", style="bold")
    return table


def _show_open(report: AuditReport, console: Console, full: bool) -> None:
    """What nobody stated: the document's gaps and the defaults taken."""
    if full:
        for key, why in {**report.assumptions, **report.defaults}.items():
            console.print(Text.assemble((f"  {key} ", "dim"), why))
        return
    if report.assumptions:
        console.print(Text(f"Not in the document: {', '.join(report.assumptions)}.", style="dim"))
    if report.defaults:
        words = [f"{key} {why.split(':')[0]}" for key, why in report.defaults.items()]
        console.print(Text(f"Defaults used: {', '.join(words)}.", style="dim"))
    console.print(Text("Every formula, memory line and reason: --full. For programs: --json.", style="dim"))
