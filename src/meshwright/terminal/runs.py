"""Kept runs as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from meshwright.runs import Found, RunRecord
from meshwright.terminal import printable
from meshwright.terminal.wording import figures_table
from meshwright.units import BYTES, SECONDS


def show_runs(runs: Sequence[Found], console: Console) -> None:
    """Print a row for each run, and each machine once."""
    if not runs:
        console.print("no run has been kept here")
        return
    names = ("run", "layout", "step", "predicted", "off", "memory", "predicted ", "off ", "on")
    rows = figures_table(*names)
    machines = list(dict.fromkeys(one.record.machine.words for one in runs))
    for one in runs:
        record = one.record
        rows.add_row(
            printable(one.folder),
            _degrees(record),
            SECONDS.format(record.measured.step_time_s),
            SECONDS.format(record.predicted.step_time_s) + ("" if record.calibration else "*"),
            f"{record.time_error:+.0%}",
            BYTES.format(record.measured.peak_memory_bytes),
            BYTES.format(record.predicted.peak_memory_bytes),
            f"{record.memory_error:+.0%}",
            str(machines.index(record.machine.words) + 1),
        )
    console.print(rows)
    for number, words in enumerate(machines, 1):
        console.print(f"on {number}: {printable(words)}")
    if any(one.record.calibration is None for one in runs):
        console.print(
            "* priced by the catalogue's curves or assumed rates, not by a calibration of the machine"
        )


def _degrees(record: RunRecord) -> str:
    """The axes that are divided."""
    divided = (f"{axis}{n}" for axis, n in record.layout.items() if n > 1 and axis != "world_size")
    return " ".join(divided) or "1 rank"
