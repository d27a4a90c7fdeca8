"""Simulated steps as text for people: how long, what it waits for, a picture, and what else was asked."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshwright.efficiency_table import EfficiencyTable
from meshwright.plan import Plan
from meshwright.simulation import Answer, AtLength, Placed, ScheduleRow
from meshwright.simulator.failures import Goodput, Reliability
from meshwright.simulator.spares import Spares
from meshwright.terminal import printable
from meshwright.terminal.wording import duration, figures_table, interval, short_layout, short_policy
from meshwright.units import BYTES, SECONDS

MOST_CHANGES = 5
"""Changes of a plan that are told."""
PICTURE_MARGIN = 2
"""Columns left free beside the picture of a step."""


def show_simulation(answer: Answer, console: Console) -> None:
    """Print everything that was simulated."""
    plan = answer.plan
    title = f"{printable(plan.name)}: {short_layout(plan)}  {short_policy(plan)}"
    console.print(Text(f"{title}, {plan.num_micro_batches} micro-batches", style="bold"))
    console.print()
    console.print(_steps_table(plan, answer.at))
    _show_path(answer.longest, plan.cluster.calibration, console)
    _show_changes(answer, console)
    console.print()
    width = console.width - PICTURE_MARGIN
    console.print(Text(answer.longest.step.timeline().text(width), no_wrap=True))
    if answer.schedules is not None:
        console.print()
        console.print(_schedules_table(answer.schedules))
    if answer.placed is not None:
        console.print()
        _show_placed(answer.placed, console)
    if answer.reliability is not None and answer.spares is not None:
        console.print()
        _show_failures(answer.reliability, answer.spares, console)


def _steps_table(plan: Plan, at: tuple[AtLength, ...]) -> Table:
    names = ["tokens", "step", "80 % interval", "sequences/s", "bubble", "exposed comm."]
    drawn = ["drawn: median", "10–90 %"] if at[0].sampled is not None else []
    table = figures_table(*names, *drawn)
    for one in at:
        seconds, (low, high) = one.step.step_time_s, one.interval_s
        exposed = sum(one.step.exposed_comm_s.values())
        row = [
            f"{one.length:,}",
            SECONDS.format(seconds),
            interval(low, high),
            f"{plan.workload.global_batch_size / seconds:,.1f}",
            f"{one.step.bubble_fraction:.1%}",
            SECONDS.format(exposed),
        ]
        if one.sampled is not None:
            drawn_ends = interval(one.sampled.quantile(0.1), one.sampled.quantile(0.9))
            row += [SECONDS.format(one.sampled.quantile(0.5)), drawn_ends]
        table.add_row(*row)
    return table


def _show_path(at: AtLength, table: EfficiencyTable | None, console: Console) -> None:
    console.print(f"The critical path at {at.length:,} tokens:")
    for line in at.step.critical_path.words():
        console.print(f"  {line}")
    console.print(
        f"{at.step.events:,} events in {SECONDS.format(at.step.wall_s)}. Kernels and links are priced as by "
        "`plan`; what is simulated is how they come together."
    )
    if table is not None:
        words = f"Prices of ops and collectives: measured on {table.date}, {table.machine.words}."
        console.print(Text(printable(words)))


def _show_changes(answer: Answer, console: Console) -> None:
    """The changes that save most, simulated: what to try next."""
    if not answer.changes:
        console.print("No single change that fits, of a degree or a choice, saves half a per cent.")
        return
    console.print("What would shorten it, one change at a time, simulated:")
    now = answer.longest.step.step_time_s
    for change in answer.changes[:MOST_CHANGES]:
        saved = f"{SECONDS.format(change.saved_s)} or {change.saved_s / now:.0%}"
        console.print(f"  {change.words} saves {saved}; peak memory {BYTES.format(change.peak_memory_bytes)}")


def _schedules_table(rows: tuple[ScheduleRow, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("schedule", "chunks", "step", "bubble", "peak memory"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    table.add_column("", overflow="fold")
    for row in rows:
        cells = [row.schedule, str(row.vpp)]
        if row.step_time_s is None or row.bubble_fraction is None or row.peak_memory_bytes is None:
            table.add_row(*cells, "", "", "", row.refused or "")
            continue
        memory = BYTES.format(row.peak_memory_bytes)
        table.add_row(*cells, SECONDS.format(row.step_time_s), f"{row.bubble_fraction:.1%}", memory, "")
    return table


def _show_placed(placed: Placed, console: Console) -> None:
    place = placed.placement
    console.print(
        f"Experts placed by their counted loads: fullest rank over the mean {place.before:.3f} in order, "
        f"{place.after:.3f} placed, at least {place.bound:.3f} whatever the placement."
    )
    console.print(
        f"The step, routing drawn from the counts: {SECONDS.format(placed.before_s)} in order, "
        f"{SECONDS.format(placed.after_s)} placed."
    )
    worst = place.worst
    groups = " | ".join(" ".join(map(str, own)) for own in worst.experts_by_rank)
    console.print(Text(f"layer {worst.layer}, the least even: {groups}", overflow="ellipsis", no_wrap=True))


def _show_failures(found: Reliability, spares: Spares, console: Console) -> None:
    rate, chosen = found.rate, found.chosen
    console.print(f"Failures: one every {duration(rate.mtbf_s)} on {rate.num_gpus:,} GPUs ({rate.source}).")
    if chosen.interval_steps is None:
        console.print("No checkpoint pays: nothing fails, or saving costs more than it keeps.")
        return
    console.print(
        f"Save every {chosen.interval_steps:,} steps ({duration(chosen.interval_s)}): "
        f"{chosen.effective_fraction:.2%} of the time is training; saving takes "
        f"{chosen.saving_fraction:.2%}, work done twice {chosen.lost_fraction:.2%}, recovery "
        f"{chosen.recovery_fraction:.2%}."
    )
    console.print(
        f"At half the interval {_share(found.half)}, at double {_share(found.double)}. "
        f"Young: {duration(found.young[0])}, Daly: {duration(found.daly[0])}."
    )
    console.print(
        f"{spares.enough.num_spares} spare nodes have a replacement at hand at "
        f"{spares.probability_fraction:.0%} of failures with repairs of {duration(spares.repair_s)}; without "
        f"any the job waits {spares.none.waiting_fraction:.1%} of the time."
    )
    console.print(
        f"Assumed: saving stops training for {duration(found.checkpoint.stall_s)}, recovery takes "
        f"{duration(found.recovery.total_s)}, and failures are independent at a constant rate."
    )


def _share(at: Goodput) -> str:
    return f"{at.effective_fraction:.2%}"
