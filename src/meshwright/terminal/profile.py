"""A profile as text for people: where the time goes by rank and by axis, predicted beside measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from meshwright.profiling import ProfileAnswer, ShareAnswer
from meshwright.profiling.joined import Row
from meshwright.terminal import printable
from meshwright.terminal.wording import figures_table, short_layout, short_policy
from meshwright.units import BYTES, SECONDS

MOST_ROWS = 12


def show_profile(answer: ProfileAnswer, console: Console) -> None:
    """Print all of it."""
    plan = answer.plan
    title = f"{printable(plan.name)}: {short_layout(plan)}  {short_policy(plan)}"
    console.print(Text(f"{title}, {plan.num_micro_batches} micro-batches", style="bold"))
    console.print(printable(answer.record.machine.words))
    console.print()
    _show_step(answer, console)
    _show_ranks(answer, console)
    _show_axes(answer, console)
    _show_rows(answer.rows, console)


def show_share(answer: ShareAnswer, console: Console) -> None:
    """Print what one rank computes, beside what was predicted."""
    plan = answer.plan
    title = f"{printable(plan.name)}: {short_layout(plan)}  {short_policy(plan)}, rank {answer.rank} alone"
    console.print(Text(title, style="bold"))
    console.print(printable(answer.machine.words))
    console.print()
    rows = figures_table("", "measured", "predicted", "predicted / measured")
    pair = SECONDS.format(answer.median_s), SECONDS.format(answer.predicted_s)
    rows.add_row("computed in a step", *pair, f"{1 + answer.off:.2f}")
    peak, model = answer.peak_bytes, answer.predicted_bytes
    rows.add_row("tensors at the peak", BYTES.format(peak), BYTES.format(model), f"{model / peak:.2f}")
    console.print(rows)
    answered = SECONDS.format(statistics.median(answer.answered_s))
    console.print(
        f"median of {len(answer.computed_s)} steps, without {answered} in which collectives were answered on "
        f"the spot; tokens are spread evenly. Prices: {_priced(plan.cluster.calibration is not None)}."
    )
    _show_rows(answer.rows, console)


def _priced(calibrated: bool) -> str:
    return "the machine's calibration" if calibrated else "assumed rates: calibrate first"


def _show_step(answer: ProfileAnswer, console: Console) -> None:
    measured, expected = answer.step_time_s, answer.predicted.step.step_time_s
    peak, model = max(answer.peak_bytes), max(answer.predicted.tensor_bytes)
    rows = figures_table("", "measured", "predicted", "predicted / measured")
    rows.add_row("step", SECONDS.format(measured), SECONDS.format(expected), f"{expected / measured:.2f}")
    rows.add_row("tensors at the peak", BYTES.format(peak), BYTES.format(model), f"{model / peak:.2f}")
    console.print(rows)
    priced = _priced(answer.record.calibration is not None)
    console.print(
        f"median of {len(answer.step_s)} steps without the profiler; {len(answer.profiled_s)} more under it "
        f"show where time goes. Prices: {priced}."
    )


def _show_ranks(answer: ProfileAnswer, console: Console) -> None:
    console.print()
    rows = figures_table("rank", "step", "compute", "communication", "hidden", "exposed", "idle")
    for use in answer.uses:
        times = (use.step_s, use.compute_s, use.comm_s, use.hidden_s, use.comm_s - use.hidden_s, use.idle_s)
        rows.add_row(str(use.rank), *map(SECONDS.format, times))
    console.print(rows)
    if len(answer.uses) > 1:
        console.print(f"Rank {answer.slowest.rank} computes longest; the others wait for it.")


def _show_axes(answer: ProfileAnswer, console: Console) -> None:
    axes = {axis.axis for use in answer.uses for axis in use.axes}
    if not axes:
        return
    console.print()
    rows = figures_table("axis", "calls", "bytes", "seconds", "hidden", "exposed", "overlap")
    for name in sorted(axes):
        of_axis = [axis for use in answer.uses for axis in use.axes if axis.axis == name]
        count = len(of_axis)
        seconds, hidden = sum(a.seconds for a in of_axis) / count, sum(a.hidden_s for a in of_axis) / count
        calls, size = sum(a.calls for a in of_axis) / count, sum(a.bytes for a in of_axis) / count
        times = (SECONDS.format(seconds), SECONDS.format(hidden), SECONDS.format(seconds - hidden))
        rows.add_row(
            name, f"{calls:g}", BYTES.format(size), *times, f"{hidden / seconds:.0%}" if seconds else ""
        )
    console.print(rows)


def _show_rows(all_rows: Sequence[Row], console: Console) -> None:
    if not all_rows:
        return
    console.print()
    rows = figures_table("what", "part", "measured", "predicted", "apart")
    for row in all_rows[:MOST_ROWS]:
        both = [SECONDS.format(s) if s is not None else "–" for s in (row.measured_s, row.predicted_s)]
        rows.add_row(printable(row.what), row.part, *both, SECONDS.format(row.apart_s))
    console.print(rows)
    if len(all_rows) > MOST_ROWS:
        console.print(f"and {len(all_rows) - MOST_ROWS} more that disagree less")
