"""An audit on the terminal: whether the layout can exist, then what fails and why, what is open, what holds.

Names, places, reasons and values come from a file that somebody else wrote: all pass `printable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.audit import AuditReport, Checked
from meshwright.audit.repair import Repair
from meshwright.cost.memory import RankMemory, worst
from meshwright.terminal import printable
from meshwright.terminal.ranges import runs
from meshwright.units import BYTES, format_count
from meshwright.verify import Finding

MARKS = {"fails": ("✗", "red"), "undetermined": ("?", "yellow"), "holds": ("✓", "green")}
_MOST_COLUMNS = 8
_COUNT = re.compile(r"(?P<number>\d+) (?P<thing>\S+?)(?:e?s)? (?P<rest>.*)")
_SIZES = ("tp", "cp", "pp", "dp", "ep", "etp", "edp")


def show_audit(report: AuditReport, console: Console, full: bool = False) -> None:
    """Print a report in one screen; `full` adds every formula, place, memory line and reason."""
    console.print(Text(printable(report.title), style="bold"))
    _show_layout(report, console)
    _show_summary(report, console)
    if full:
        _show_every_figure(report, console)
    else:
        _show_reasons(report.claims, console)
        _show_names([c for c in report.claims if c.verdict == "holds"], console)
    _show_findings(report, console)
    _show_other_layouts(report, console)
    _show_memory(report, console, full)
    _show_open(report, console, full)


def _show_layout(report: AuditReport, console: Console) -> None:
    """The answer: whether the stated layout can exist, else what it breaks and the nearest that can."""
    stated = _degrees(report.stated_layout)
    gpus = f"{report.cluster.num_gpus:,} GPUs"
    if report.possible:
        console.print(Text.assemble(("Layout ", "bold"), f"{stated} can exist on these {gpus}."))
        return
    rules = [_rule(finding) for finding in report.broken_rules]
    head = Text.assemble(("Layout ", "bold"), f"{stated} ", ("cannot exist", "bold red"), f" on {gpus}:")
    if len(rules) == 1:
        console.print(Text.assemble(head, f" {rules[0]}. {_nearest(report)}"))
        return
    console.print(head)
    for rule in rules:
        console.print(f"  {rule}.")
    console.print(_nearest(report))


def _degrees(layout: Mapping[str, int]) -> str:
    """TP PP DP EP always; the others where they are not 1 (etp equal to tp without ep is no choice)."""
    chosen_etp = layout["ep"] > 1 or layout["etp"] != layout["tp"]
    words = []
    for axis in ("tp", "cp", "pp", "vpp", "dp", "ep", "etp"):
        if axis in ("tp", "pp", "dp", "ep") or (layout[axis] > 1 and (axis != "etp" or chosen_etp)):
            words.append(f"{axis.upper()}{layout[axis]}")
    return " ".join(words)


def _rule(finding: Finding) -> str:
    near = f" (nearest: {', '.join(map(str, finding.nearest))})" if finding.nearest else ""
    return printable(f"{finding.key} {finding.value}: {finding.rule}{near}")


def _nearest(report: AuditReport) -> str:
    if not report.nearest_layouts:
        return "No other layout of this model and batch can exist there either."
    repair = report.nearest_layouts[0]
    memory = "not every rule holds there"
    if repair.peak_memory_bytes is not None:
        fits = "fits" if repair.fits else "DOES NOT FIT"
        peak, capacity = BYTES.format(repair.peak_memory_bytes), BYTES.format(report.cluster.gpu.memory)
        memory = f"{peak} of {capacity} per GPU, {fits}"
    return f"Nearest that can: {_changes(repair)} ({memory})."


def _changes(repair: Repair) -> str:
    return ", ".join(f"{axis.upper()} {old} -> {new}" for axis, (old, new) in repair.changes.items())


def _show_summary(report: AuditReport, console: Console) -> None:
    model, counts = report.model, report.parameters
    kind = f"{model.num_experts} experts, top {model.num_experts_per_tok}" if model.is_moe else "dense"
    console.print(
        f"{report.cluster.num_gpus:,} GPUs · {format_count(counts.total)} parameters, "
        f"{format_count(counts.active)} active · {model.num_hidden_layers} layers, {kind}"
    )
    if report.claims:
        counted = report.counts()
        many = "s" * (len(report.claims) > 1)
        console.print(
            f"{len(report.claims)} stated figure{many}: {counted['holds']} hold, {counted['fails']} fail, "
            f"{counted['undetermined']} undetermined. An arrow is stated -> computed."
        )
    for note in report.notes:
        console.print(f"note: {printable(note)}")


def _grouped(claims: Iterable[Checked]) -> list[tuple[Checked, int]]:
    """Equal statements with equal reasons once, with how often the document makes them."""
    groups: dict[tuple[object, ...], tuple[Checked, int]] = {}
    for checked in claims:
        # Where the document's own formula fails, its text leads the reason: the rest says why.
        why = checked.why if checked.formula_value is None else checked.why.partition(". ")[2]
        values = (checked.stated, checked.computed, checked.formula_value)
        key = (checked.figure.id, *values, checked.verdict, checked.figure.at, why)
        first, count = groups.get(key, (checked, 0))
        groups[key] = (first, count + 1)
    return list(groups.values())


def _times(count: int) -> str:
    return f" (x{count})" if count > 1 else ""


def _show_reasons(claims: Sequence[Checked], console: Console) -> None:
    """What fails, then what is open; what an earlier reason said already is not said again."""
    said: set[str] = set()
    for verdict in ("fails", "undetermined"):
        for checked, count in _grouped(c for c in claims if c.verdict == verdict):
            console.print(_reason(checked, said_once(checked.why, said), _times(count)))


def said_once(why: str, said: set[str]) -> str:
    """A reason without the sentences in `said`, where its own are put."""
    sentences = re.split(r"(?<=\.) ", why)
    unsaid = [sentence for sentence in sentences if sentence not in said]
    said.update(sentences)
    return " ".join(unsaid) or "As above."


def _reason(checked: Checked, why: str, times: str = "") -> Text:
    mark, colour = MARKS[checked.verdict]
    return Text.assemble(
        (f"{mark} {printable(checked.figure.id)}", f"bold {colour}"),
        (f" {_stated(checked)}{_against(checked)}{times}: ", "bold"),
        printable(why),
    )


def _stated(checked: Checked) -> str:
    return printable(checked.kind.format(checked.stated))


def _against(checked: Checked) -> str:
    """What the stated value is held against: the document's own formula, or what the description gives."""
    if checked.formula_value is not None:
        return f" (its formula gives {printable(checked.kind.format(checked.formula_value))})"
    if checked.computed is None or checked.verdict == "holds":
        return ""
    return f" -> {printable(checked.kind.format(checked.computed))}"


def _show_names(claims: Sequence[Checked], console: Console) -> None:
    if not claims:
        return
    counts: dict[str, int] = {}
    for checked in claims:
        words = f"{printable(checked.figure.id)} {_stated(checked)}"
        counts[words] = counts.get(words, 0) + 1
    listed = ", ".join(f"{words}{_times(count)}" for words, count in counts.items())
    console.print(Text.assemble(("✓ ", "bold green"), ("holds: ", "bold"), f"{listed}."))


def _show_every_figure(report: AuditReport, console: Console) -> None:
    """Each figure in the document's order with its reason, our formula, the document's own and its place."""
    for checked in report.claims:
        console.print(_reason(checked, checked.why))
        details = [f"ours: {checked.formula}"] if checked.formula else []
        if checked.figure.formula:
            details.append(f"the document's: {checked.figure.formula}")
        if checked.figure.where:
            details.append(f"in: {checked.figure.where}")
        if details:
            console.print(Text("    " + " · ".join(map(printable, details)), style="dim"))


def _show_findings(report: AuditReport, console: Console) -> None:
    for finding in report.findings:
        mark, colour = ("✗", "red") if finding.level == "error" else ("!", "yellow")
        console.print(Text.assemble((f"{mark} ", f"bold {colour}"), _rule(finding)))


def _show_other_layouts(report: AuditReport, console: Console) -> None:
    others = report.nearest_layouts[1:]
    if report.possible or not others:
        return
    console.print("Other layouts that can exist:")
    table = Table(box=None, pad_edge=False, show_edge=False)
    sizes = [axis.upper() for axis in _SIZES]
    for heading in (f"  {sizes[0]}", *sizes[1:], "micro-batch", "changes", "figures kept", "fullest GPU"):
        table.add_column(heading, justify="left" if heading == "changes" else "right")
    for repair in others:
        peak = "-" if repair.peak_memory_bytes is None else BYTES.format(repair.peak_memory_bytes)
        table.add_row(
            *(str(repair.layout.size(axis)) for axis in _SIZES),
            "-" if repair.micro_batch_size is None else str(repair.micro_batch_size),
            _changes(repair),
            str(repair.kept_figures),
            f"{peak} !" if repair.fits is False else peak,
        )
    console.print(table)
    if any(repair.fits is False for repair in others):
        console.print(f"  ! does not fit in the {BYTES.format(report.cluster.gpu.memory)} of a GPU")


def _show_memory(report: AuditReport, console: Console, full: bool) -> None:
    if not report.memory:
        return
    peak = worst(report.memory)
    capacity = report.cluster.gpu.memory
    share = peak.total_bytes / capacity
    fits = "fits" if share <= 1 else "DOES NOT FIT"
    need = f"{BYTES.format(peak.total_bytes)} of {BYTES.format(capacity)} ({100 * share:.3g} %, {fits})"
    where = f"of {printable(report.memory_words)}: pipeline rank {peak.pp_rank}"
    console.print(Text.assemble(("Memory ", "bold"), f"{where} needs most, {need}."))
    if full:
        console.print(memory_table(report.memory))


def memory_table(ranks: Sequence[RankMemory]) -> Table:
    """Memory by part and pipeline rank, of a few ranks where there are many."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("  part")
    few = len(ranks) <= _MOST_COLUMNS
    shown = ranks if few else [ranks[0], ranks[1], ranks[len(ranks) // 2], ranks[-1]]
    for rank in shown:
        table.add_column(f"rank {rank.pp_rank}", justify="right")
    table.add_column("why")
    for name in dict.fromkeys(line.name for rank in shown for line in rank.lines):
        sizes = [BYTES.format(rank.line(name)) for rank in shown]
        table.add_row(f"  {name}", *sizes, printable(_why(name, shown)))
    table.add_row("  total", *[BYTES.format(rank.total_bytes) for rank in shown], "", style="bold")
    return table


def _why(name: str, ranks: Sequence[RankMemory]) -> str:
    """The reason of one line; where ranks differ, each rank's own, or `4/3/2/1 …` for a leading number."""
    whys = {rank.pp_rank: line.why for rank in ranks for line in rank.lines if line.name == name}
    same: dict[str, list[int]] = {}
    for rank, why in whys.items():
        same.setdefault(why, []).append(rank)
    if len(same) == 1:
        return next(iter(same))
    counts = [_COUNT.match(why) for why in whys.values()]
    ends = {count.group("thing", "rest") if count else None for count in counts}
    if len(whys) == len(ranks) and len(ends) == 1 and None not in ends:
        numbers = "/".join(count["number"] for count in counts if count)
        return numbers + max(same, key=len).lstrip("0123456789")
    return "; ".join(f"rank {runs(held)}: {why}" for why, held in same.items())


def _show_open(report: AuditReport, console: Console, full: bool) -> None:
    """What nobody stated: the document's gaps and the defaults taken."""
    if full:
        for key, why in {**report.assumptions, **report.defaults}.items():
            console.print(Text.assemble((f"  {printable(key)} ", "dim"), printable(why)))
        return
    if report.assumptions:
        words = [printable(key) for key in report.assumptions]
        console.print(Text(f"Not in the document: {', '.join(words)}.", style="dim"))
    if report.defaults:
        words = [printable(f"{key} {why.split(':')[0]}") for key, why in report.defaults.items()]
        console.print(Text(f"Defaults used: {', '.join(words)}.", style="dim"))
    console.print(Text("Every formula, memory line and reason: --full. For programs: --json.", style="dim"))
