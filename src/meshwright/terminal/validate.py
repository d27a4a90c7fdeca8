"""Scores of predictions on the terminal: errors by group, what the rows were taken for, the worst of them.

Names, frameworks and reasons come from a table that somebody else wrote: all pass `printable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.terminal import printable
from meshwright.units import BYTES
from meshwright.validate.answer import Validation, worst_rows
from meshwright.validate.score import Prediction, Scored

TITLES = {
    "dense": "dense",
    "moe_full": "MoE, all stated",
    "moe_partial": "MoE, in part",
    "moe_efa": "MoE over EFA",
}
_NONE = "–"


def show_validation(validation: Validation, console: Console, full: bool = False) -> None:
    """Print the scores in one screen; `full` adds every row and every refusal."""
    document = validation.document
    console.print(
        Text.assemble(
            (f"{document['scored']:,} of {document['rows']:,} rows predicted", "bold"),
            f" with {validation.basis}.",
        )
    )
    _show_times(document["groups"], console, "time", "Step time")
    if any("simulated" in group for group in document["groups"].values()):
        _show_times(document["groups"], console, "simulated", "Step time, simulated")
    _show_memory(document["groups"], console)
    _show_frameworks(validation, console)
    _show_refusals(validation, console, full)
    _show_worst(validation, console)
    if full:
        _show_every_row(validation, console)


def _table(console: Console, title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first columns hold words and the others numbers."""
    console.print()
    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def _show_times(groups: Mapping[str, Any], console: Console, key: str, title: str) -> None:
    names = (
        "rows",
        "mean error",
        "median",
        "largest",
        "bias",
        "pairs right",
        "same mbs",
        "in 80 %",
        "± half",
    )
    table = _table(console, title, "", *names)
    for name, group in groups.items():
        if key not in group:
            continue
        time = group[key]
        table.add_row(
            TITLES[name],
            str(time["rows"]),
            share(time["mape"]),
            share(time["median_ape"]),
            share(time["max_ape"]),
            share(time["bias"], signed=True),
            _of(time["pair_ranking"], time["pairs"]),
            _of(time["pair_ranking_equal_micro_batch"], time["pairs_equal_micro_batch"]),
            share(time["coverage_80"]),
            share(time["interval_half_width"]),
        )
    console.print(table)


def _show_memory(groups: Mapping[str, Any], console: Console) -> None:
    table = _table(console, "Peak memory", "", "rows", "mean error", "median", "largest", "bias")
    for name, group in groups.items():
        memory = group["memory"]
        if memory["rows"]:
            errors = [share(memory[key]) for key in ("mape", "median_ape", "max_ape")]
            table.add_row(TITLES[name], str(memory["rows"]), *errors, share(memory["bias"], signed=True))
    console.print(table if table.row_count else "No row states it.")


def _show_frameworks(validation: Validation, console: Console) -> None:
    table = _table(console, "Frameworks were taken for", "framework", "engine", "era", "rows", left=3)
    counted = validation.frameworks().items()
    for (framework, engine, era), rows in sorted(counted, key=lambda item: (-item[1], item[0])):
        table.add_row(printable(framework), engine, era, str(rows))
    console.print(table)


def _show_refusals(validation: Validation, console: Console, full: bool) -> None:
    refused = validation.document["refused"]
    if not refused:
        return
    table = _table(console, "Not predicted", "rows", "reason", left=0)
    table.columns[1].justify = "left"
    for reason, rows in refused.items():
        table.add_row(str(rows), printable(reason))
    console.print(table)
    if full:
        for refusal in validation.table.refusals:
            console.print(printable(f"  {refusal.id}: {refusal.reason}: {refusal.detail}"))


def _show_worst(validation: Validation, console: Console) -> None:
    rows = worst_rows(validation.scored)
    if not rows:
        return
    names = ("row", "group", "model", "GPUs", "measured", "predicted", "error")
    table = _table(console, "Predicted worst", *names, left=4)
    for scored, error in rows:
        row = scored.run.row
        table.add_row(
            printable(row.id),
            scored.run.group,
            printable(row.model),
            printable(f"{row.num_gpus} {row.gpu}"),
            seconds(scored.run.measured_s),
            seconds(scored.prediction.step_time_s),
            share(error, signed=True),
        )
    console.print(table)


def _show_every_row(validation: Validation, console: Console) -> None:
    names = (
        "row",
        "group",
        "measured",
        "predicted",
        "80 % interval",
        "error",
        "memory",
        "predicted",
        "error",
    )
    table = _table(console, "Every row", *names, left=2)
    for scored in validation.scored:
        table.add_row(*_row(scored))
    console.print(table)


def _row(scored: Scored) -> tuple[str, ...]:
    run, prediction = scored.run, scored.prediction
    memory = run.memory.bytes if run.memory else None
    return (
        printable(run.id),
        run.group,
        seconds(run.measured_s),
        seconds(prediction.step_time_s),
        _interval(prediction),
        _error(prediction.step_time_s, run.measured_s),
        BYTES.format(memory) if memory else _NONE,
        BYTES.format(prediction.memory_bytes) if prediction.memory_bytes else _NONE,
        _error(prediction.memory_bytes, memory),
    )


def _interval(prediction: Prediction) -> str:
    return f"{seconds(prediction.low_s)} – {seconds(prediction.high_s)}"


def _error(predicted: float | None, measured: float | None) -> str:
    if not predicted or not measured:
        return _NONE
    return share(predicted / measured - 1, signed=True)


def seconds(value: float | None) -> str:
    """A time to three digits; a dash for none."""
    if value is None:
        return _NONE
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def share(value: float | None, signed: bool = False) -> str:
    """A fraction as per cent; a dash for none."""
    if value is None:
        return _NONE
    return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"


def _of(value: float | None, count: int) -> str:
    return _NONE if value is None else f"{share(value)} of {count}"
