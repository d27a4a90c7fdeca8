"""A calibration as text for people: the machine, what it reaches, what of the plans that covers."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from rich.console import Console
from rich.text import Text

from meshwright.calibrating import Calibrated, Covered
from meshwright.efficiency_table import EfficiencyTable, Kernels
from meshwright.terminal import printable
from meshwright.terminal.wording import figures_table
from meshwright.units import BYTES, BYTES_PER_S, FLOPS_PER_S, SECONDS

MOST_LISTED = 6
"""Shapes and links that are not measured, listed of each plan."""


def show_calibration(found: Calibrated, console: Console) -> None:
    """Print all of it."""
    table = found.table
    console.print(Text(printable(table.machine.words), style="bold"))
    console.print(f"{table.date}, {SECONDS.format(table.wall_s)} of measuring {printable(table.subject)}")
    for kernels in table.kernels:
        _show_kernels(kernels, console)
    _show_links(table, console)
    for one in found.covers:
        _show_coverage(one, console)


def _show_kernels(kernels: Kernels, console: Console) -> None:
    ranks = f"{kernels.ranks} rank{'s' if kernels.ranks > 1 else ''} at work"
    threads = f"{kernels.threads} thread{'s' if kernels.threads > 1 else ''} each"
    console.print()
    console.print(Text(f"{ranks}, {threads}, {kernels.precision}", style="bold"))
    rows = figures_table("op", "shapes", "least", "most", "best rate", "median spread")
    for op in dict.fromkeys(point.op for point in kernels.points):
        points = [point for point in kernels.points if point.op == op]
        seconds = [point.time_s for point in points]
        spreads = sorted(point.spread for point in points)
        sizes = f"{len({point.sizes for point in points})}"
        ends = (SECONDS.format(min(seconds)), SECONDS.format(max(seconds)))
        rows.add_row(op, sizes, *ends, _best(kernels, op), f"{spreads[len(spreads) // 2]:.0%}")
    console.print(rows)
    host = ", ".join(f"{SECONDS.format(s)} {kind}" for kind, s in kernels.host_s.items())
    console.print(f"launching an op: {host}; a step beside its ops: {SECONDS.format(kernels.step_s)}")


def _best(kernels: Kernels, op: str) -> str:
    """FLOP/s of the best shape, for matmuls."""
    if op not in ("matmul", "grouped_matmul"):
        return ""
    rates = [2 * prod(p.sizes[-3:]) / p.time_s for p in kernels.points if p.op == op]
    return FLOPS_PER_S.format(max(rates))


def _show_links(table: EfficiencyTable, console: Console) -> None:
    if not table.links:
        return
    console.print()
    rows = figures_table("collective", "ranks", "least", "payload", "most", "bytes/s there")
    for kind, ranks in dict.fromkeys((point.collective, point.ranks) for point in table.links):
        points = [point for point in table.links if (point.collective, point.ranks) == (kind, ranks)]
        last = max(points, key=lambda point: point.bytes)
        least = SECONDS.format(min(point.time_s for point in points))
        rate = BYTES_PER_S.format(last.bytes / last.time_s)
        size = BYTES.format(last.bytes)
        rows.add_row(kind, f"{ranks}", least, size, SECONDS.format(last.time_s), rate)
    console.print(rows)


def _show_coverage(one: Covered, console: Console) -> None:
    shares = one.confidence.shares
    words = ", ".join(f"{share:.0%} {basis}" for basis, share in shares.items())
    console.print()
    console.print(Text(f"{printable(one.plan.name)}: of a micro-batch's seconds {words}"))
    for line in _open(one):
        console.print(Text(f"  {line}"))


def _open(one: Covered) -> Iterator[str]:
    unmeasured = one.confidence.unmeasured
    for found in unmeasured[:MOST_LISTED]:
        basis = "not covered: assumed" if found.basis == "assumed" else found.basis
        yield f"{found.share_fraction:.1%} {found.what}: {basis}"
    if len(unmeasured) > MOST_LISTED:
        yield f"and {len(unmeasured) - MOST_LISTED} more"
