"""Plans in a few words, and tables of them."""

from __future__ import annotations

from rich.table import Table

from meshwright.plan import Plan
from meshwright.units import SECONDS

CHOICE = "layout and policy"
"""Heading of the one column of a table that breaks, between words."""


def short_layout(plan: Plan) -> str:
    """A layout in a few words: TP4 PP4×6 EP64, with what is 1 left out."""
    layout = plan.layout
    words = [f"TP{layout.tp}"] if layout.tp > 1 else []
    words += [f"CP{layout.cp}"] if layout.cp > 1 else []
    if layout.pp > 1:
        words.append(f"PP{layout.pp}×{layout.vpp}" if layout.vpp > 1 else f"PP{layout.pp}")
    words += [f"EP{layout.ep}"] if layout.ep > 1 else []
    if layout.etp > 1 and layout.etp != layout.tp:
        words.append(f"ETP{layout.etp}")
    replicas = f" in {layout.dp_replicas} replicas" if layout.dp_replicas > 1 else ""
    return " ".join([*words, f"DP{layout.dp}{replicas}"])


_SHORT_SCHEDULE: dict[str, str] = {
    "Interleaved1F1B": "I1F1B",
    "InterleavedZeroBubble": "IZB",
    "ZBVZeroBubble": "ZBV",
}


def short_policy(plan: Plan) -> str:
    """A policy in a few words; `SP` sequence parallelism, `rc` recompute, `+ov` expert overlap."""
    policy, layout = plan.policy, plan.layout
    words = [f"mbs{policy.micro_batch_size}"]
    words += [_SHORT_SCHEDULE.get(policy.schedule, policy.schedule)] if layout.pp > 1 else []
    words.append(f"ZeRO{policy.zero_stage}")
    words += ["SP"] if policy.sequence_parallel and layout.tp > 1 else []
    words += [f"{policy.recompute}-rc"] if policy.recompute != "none" else []
    if layout.ep > 1:
        words.append(policy.dispatcher + ("+ov" if policy.expert_overlap else ""))
    return " ".join(words)


def interval(low_s: float, high_s: float) -> str:
    """Two times in the unit of the larger."""
    high = SECONDS.format(high_s)
    number, unit = high.split()
    scale = high_s / float(number)
    return f"{low_s / scale:.4g}–{number} {unit}"


def duration(seconds: float) -> str:
    """A time that people wait for: days and hours where there are several."""
    for name, unit in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.4g} {name}"
    return SECONDS.format(seconds)


def figures_table(*headings: str) -> Table:
    """A table of figures; only its column of layouts and policies breaks, between words."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    for heading in headings:
        words = heading == CHOICE
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words)
    return table


def choice(plan: Plan) -> str:
    return f"{short_layout(plan)}  {short_policy(plan)}"
