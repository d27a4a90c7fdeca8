"""A map of the cluster: one column per node (or per GPU on a small one), one line per axis that varies."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from meshwright.cluster import Cluster
from meshwright.layout import DENSE_ORDER, EXPERT_ORDER, Layout, View
from meshwright.terminal.ranges import progression, runs

PALETTE = ("cyan", "yellow", "green", "magenta", "blue", "red")
_LABEL_WIDTH = 7
_FEW_RANKS = 32
_MOST_LINES = 17
_SHOWN_STAGES = 4

_AXES: tuple[tuple[str, View], ...] = (
    *((axis, "dense") for axis in DENSE_ORDER),
    *((axis, "expert") for axis in EXPERT_ORDER if axis != "pp"),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of a map stand for: `count` runs of `ranks` consecutive ranks each, from rank 0 on."""

    name: str
    ranks: int
    count: int
    is_one_stage: bool


def show_cluster_map(layout: Layout, cluster: Cluster, console: Console) -> None:
    """Print where every axis lies on the machines; of many equal columns the first and last rows."""
    columns = _columns(layout, cluster)
    everywhere, varying = _split_axes(layout, columns)
    console.print(_heading(layout, cluster, columns, everywhere))
    if columns.is_one_stage:
        console.print(_stages(layout, cluster))
    if not varying:
        return
    per_row, width = _grid(layout, columns, varying, console.width)
    starts = list(range(0, columns.count, per_row))
    most = max(2, _MOST_LINES // (len(varying) + 2))
    shown = starts if len(starts) <= most else [*starts[: most - 1], starts[-1]]
    for previous, start in zip([None, *shown], shown, strict=False):
        if previous is not None:
            skipped = start - previous - per_row
            console.print(Text(f"  ⋮ {skipped:,} more {columns.name}s" if skipped else "", style="dim"))
        stop = min(start + per_row, columns.count)
        for line in _row(layout, cluster, columns, varying, range(start, stop), width):
            console.print(line)


def _columns(layout: Layout, cluster: Cluster) -> Columns:
    if layout.world_size <= _FEW_RANKS:
        return Columns("rank", 1, layout.world_size, False)
    per_node, stage_ranks = cluster.gpus_per_node, layout.world_size // layout.pp
    if layout.pp > 1 and stage_ranks % per_node == 0:
        return Columns("node", per_node, stage_ranks // per_node, True)
    return Columns("node", per_node, cluster.nodes, False)


def _split_axes(layout: Layout, columns: Columns) -> tuple[list[tuple[str, View]], list[tuple[str, View]]]:
    """Axes (of more than one rank) that look the same on every column, and those that differ."""
    everywhere: list[tuple[str, View]] = []
    varying: list[tuple[str, View]] = []
    for axis, view in _AXES:
        if layout.size(axis) == 1 or (axis == "pp" and columns.is_one_stage):
            continue
        repeats = columns.ranks >= layout.stride(axis, view) * layout.size(axis) or columns.count == 1
        (everywhere if repeats else varying).append((axis, view))
    return everywhere, varying


def _positions(layout: Layout, axis: str, view: View, first: int, num_ranks: int) -> list[int]:
    stride, size = layout.stride(axis, view), layout.size(axis)
    return sorted({rank // stride % size for rank in range(first, first + num_ranks)})


def _heading(layout: Layout, cluster: Cluster, columns: Columns, everywhere: list[tuple[str, View]]) -> Text:
    text = Text("map", style="bold")
    text.append(f", one column per {columns.name}", style="none")
    if columns.is_one_stage:
        text.append(
            f", of one pipeline stage ({columns.count:,} node{'s' * (columns.count > 1)})", style="none"
        )
    if everywhere:
        held = (
            f"{axis} {runs(_positions(layout, axis, view, 0, columns.ranks))}" for axis, view in everywhere
        )
        text.append(f"; each {columns.name} has {', '.join(held)}", style="none")
    return text


def _stages(layout: Layout, cluster: Cluster) -> Text:
    per_stage = layout.world_size // layout.pp // cluster.gpus_per_node
    stages = list(range(layout.pp))
    if len(stages) > _SHOWN_STAGES:
        stages = [*stages[: _SHOWN_STAGES - 1], stages[-1]]
    text = Text("  ")
    for previous, stage in zip([None, *stages], stages, strict=False):
        if previous is not None:
            text.append("   " if stage == previous + 1 else "   …   ")
        nodes = progression(range(stage * per_stage, (stage + 1) * per_stage))
        text.append(f"pp {stage}: nodes {nodes}", style=PALETTE[stage % len(PALETTE)])
    return text


def _grid(
    layout: Layout, columns: Columns, varying: list[tuple[str, View]], console_width: int
) -> tuple[int, int]:
    """Columns per row and the width of one, from the widest entry among the first and last of them."""
    room = console_width - _LABEL_WIDTH - 2
    sample = {*range(min(columns.count, room)), *range(max(0, columns.count - room), columns.count)}
    widest = max(
        len(runs(_positions(layout, axis, view, column * columns.ranks, columns.ranks)))
        for column in sample
        for axis, view in varying
    )
    width = max(widest, len(str(columns.count - 1))) + 1
    per_row = max(1, room // width)
    if columns.count > per_row:
        per_row -= per_row % 8 if per_row >= 8 else per_row % 4 if per_row >= 4 else 0
    return min(per_row, columns.count), width


def _row(
    layout: Layout,
    cluster: Cluster,
    columns: Columns,
    varying: list[tuple[str, View]],
    shown: range,
    width: int,
) -> list[Text]:
    lines = [_line(columns.name, [str(column) for column in shown], width, "dim")]
    if columns.name == "rank" and cluster.nodes > 1:
        lines.append(_line("node", [str(cluster.node_of(rank)) for rank in shown], width, "dim"))
    for axis, view in varying:
        held = [_positions(layout, axis, view, column * columns.ranks, columns.ranks) for column in shown]
        line = _line(axis, [], width)
        for positions in held:
            # Equal entries get equal colours, so that the members of a group stand out.
            colour = PALETTE[positions[0] // len(positions) % len(PALETTE)]
            line.append(runs(positions).rjust(width), style=colour)
        lines.append(line)
    return lines


def _line(label: str, entries: list[str], width: int, style: str = "") -> Text:
    line = Text(f"  {label:<{_LABEL_WIDTH}}", style=style)
    for entry in entries:
        line.append(entry.rjust(width))
    return line
