"""The best plan against another layout on the terminal: both step times at each length, and who is faster."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from meshwright.planner.compare import Compared, Pair, Timed
from meshwright.planner.ranked import Ranked
from meshwright.terminal import printable
from meshwright.terminal.wording import choice, figures_table, interval
from meshwright.units import BYTES, SECONDS


def show_comparison(compared: Compared, console: Console) -> None:
    """Print a comparison."""
    name = printable(compared.name)
    console.print()
    console.print(Text(f"The planned layout against {name}", style="bold"))
    for title, ranked in (("planned", compared.planned), (name, compared.against)):
        console.print(f"  {title}: {choice(ranked.plan)}, {_memory(ranked)}")
    table = figures_table("tokens", "planned", "80 % interval", name, "80 % interval", "ratio", "faster")
    for pair in (*compared.pairs, *([compared.mean] if len(compared.planned.lengths.shares) > 1 else [])):
        tokens = "mean" if pair.sequence_length is None else f"{pair.sequence_length:,}"
        sides = (text for timed in (pair.planned, pair.against) for text in _timed(timed))
        table.add_row(tokens, *sides, f"{pair.ratio:.2f}", verdict(pair, name))
    console.print(table)
    ties = [pair for pair in compared.pairs if pair.tie]
    text = "tie: the intervals overlap, so that the model cannot tell which is faster."
    if not ties:
        text = "The intervals overlap at none of these lengths: the two are apart."
    console.print(Text(f"{text} ratio: {name} over planned.", style="dim"))
    if compared.defaults:
        taken = [f"{key} {why.partition(':')[0]}" for key, why in compared.defaults.items()]
        console.print(Text(printable(f"Not in {name}, taken: {', '.join(taken)}."), style="dim"))


def verdict(pair: Pair, name: str) -> str:
    """Which of two is faster, or that they tie."""
    return {"planned": "planned", "against": name, None: "tie"}[pair.faster]


def _timed(timed: Timed) -> tuple[str, str]:
    return SECONDS.format(timed.step_time_s), interval(timed.low_s, timed.high_s)


def _memory(ranked: Ranked) -> str:
    peak, capacity = ranked.peak_memory_bytes, ranked.plan.cluster.gpu.memory
    fits = "" if ranked.fits else ", DOES NOT FIT"
    return f"{BYTES.format(peak)} of {BYTES.format(capacity)}{fits}"
