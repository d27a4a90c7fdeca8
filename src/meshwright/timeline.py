"""The events of one training step as data: what ran on which rank and stream, from when to when.

Simulated and profiled steps alike. Three pictures: a trace for Perfetto or chrome://tracing, a Gantt as SVG,
and rows of letters for a terminal.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from meshwright.errors import InputError
from meshwright.files import write_text

COMPUTE_STREAM = "compute"


class Event(NamedTuple):
    """One thing that took time.

    `action` is F, B, I or W as in a pipeline order, or `step` for what a step does once; `op` says which part
    of which block; `axis` is empty for what is no communication; stage and micro-batch are −1 where there is
    none. Seconds from the start of the step.
    """

    rank: int
    stream: str
    action: str
    op: str
    stage: int
    micro_batch: int
    axis: str
    start_s: float
    end_s: float


class Block(NamedTuple):
    """One action of a rank from its first event on the main streams to its last."""

    rank: int
    action: str
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The events of a step. `ranks` names each rank for people; `beside` are the streams whose events run
    beside the rank's own work instead of within it."""

    events: tuple[Event, ...]
    ranks: Mapping[int, str]
    total_s: float
    beside: frozenset[str] = frozenset()

    def blocks(self) -> Iterator[Block]:
        """Runs of events of one action, in order, by rank: what a Gantt shows."""
        by_rank: dict[int, list[Event]] = {rank: [] for rank in self.ranks}
        for event in self.events:
            if event.stream not in self.beside and event.end_s > event.start_s:
                by_rank[event.rank].append(event)
        for events in by_rank.values():
            events.sort(key=lambda event: event.start_s)
            yield from _merged(events)

    def to_chrome_trace(self, path: str | Path) -> None:
        """Write gzipped JSON in Chrome's trace format, which Perfetto opens: a process for each rank and a
        thread for each stream. Times in µs, to a nanosecond."""
        lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in self._trace())
        text = '{"displayTimeUnit":"ms","traceEvents":[\n' + lines + "\n]}\n"
        packed = gzip.compress(text.encode(), compresslevel=6, mtime=0)
        try:
            Path(path).write_bytes(packed)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(str(path), reason, "the file cannot be written") from error

    def _trace(self) -> Iterator[dict[str, object]]:
        threads: dict[tuple[int, str], int] = {}
        for rank, name in self.ranks.items():
            yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}}
            yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        for stream in self.streams():
            for rank in self.ranks:
                thread = threads[rank, stream] = len(threads) // len(self.ranks)
                yield {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": rank,
                    "tid": thread,
                    "args": {"name": stream},
                }
        for event in self.events:
            entry: dict[str, object] = {
                "ph": "X",
                "name": event.op,
                "cat": event.axis or event.action,
                "pid": event.rank,
                "tid": threads[event.rank, event.stream],
                "ts": round(event.start_s * 1e6, 3),
                "dur": round((event.end_s - event.start_s) * 1e6, 3),
            }
            if event.stage >= 0:
                where = {"stage": event.stage, "micro_batch": event.micro_batch}
                entry["args"] = {"action": event.action, **where}
            yield entry

    def streams(self) -> list[str]:
        """Every stream, compute first."""
        names = {event.stream for event in self.events}
        return sorted(names, key=lambda name: (name != COMPUTE_STREAM, name))

    def to_svg(self, path: str | Path, width: int = 1200) -> None:
        """Write a Gantt: a row for each rank, a bar for each action, coloured by kind."""
        write_text(path, _svg(self, width))

    def text(self, width: int = 80) -> str:
        """Rows of letters, one for each rank: the kind of action that takes most of each column, `=` for what
        a step does once, `.` for waiting. Lines are at most `width` wide."""
        labels = {rank: str(rank) for rank in self.ranks}
        margin = max((len(label) for label in labels.values()), default=0) + 1
        columns = max(width - margin, 1)
        shares = {rank: [dict[str, float]() for _ in range(columns)] for rank in self.ranks}
        for block in self.blocks():
            for column, seconds in _columns(block, self.total_s, columns):
                cell = shares[block.rank][column]
                letter = _LETTER.get(block.action, block.action[:1])
                cell[letter] = cell.get(letter, 0.0) + seconds
        one = self.total_s / columns
        rows = []
        for rank, cells in shares.items():
            letters = (_letter(cell, one) for cell in cells)
            rows.append(f"{labels[rank]:>{margin - 1}} {''.join(letters)}")
        return "\n".join(rows)


_LETTER = {"step": "="}


def _letter(cell: Mapping[str, float], column_s: float) -> str:
    waiting = column_s - sum(cell.values())
    best = max(cell, key=lambda letter: cell[letter], default=".")
    return best if cell and cell[best] >= waiting else "."


def _columns(block: Block, total_s: float, columns: int) -> Iterator[tuple[int, float]]:
    """The columns that a block touches, with its seconds in each."""
    if total_s <= 0:
        return
    one = total_s / columns
    first, last = int(block.start_s / one), min(int(block.end_s / one), columns - 1)
    for column in range(first, last + 1):
        seconds = min(block.end_s, (column + 1) * one) - max(block.start_s, column * one)
        if seconds > 0:
            yield column, seconds


def _merged(events: Iterable[Event]) -> Iterator[Block]:
    current: Block | None = None
    for event in events:
        mine = (event.rank, event.action, event.stage, event.micro_batch)
        if current is not None and current[:4] == mine:
            current = current._replace(end_s=max(current.end_s, event.end_s))
            continue
        if current is not None:
            yield current
        current = Block(*mine, event.start_s, event.end_s)
    if current is not None:
        yield current


_COLOUR = {"F": "#4e79a7", "B": "#59a14f", "I": "#8cd17d", "W": "#f1ce63", "step": "#b07aa1"}
_ROW, _GAP, _MARGIN, _AXIS = 22, 4, 120, 24


def _svg(timeline: Timeline, width: int) -> str:
    scale = (width - _MARGIN - 10) / timeline.total_s if timeline.total_s else 0.0
    row = {rank: index for index, rank in enumerate(timeline.ranks)}
    height = len(row) * (_ROW + _GAP) + _AXIS
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for rank, name in timeline.ranks.items():
        y = row[rank] * (_ROW + _GAP) + 15
        lines.append(f'<text x="2" y="{y}"><title>{escape(name)}</title>rank {rank}</text>')
    for block in timeline.blocks():
        x, long = _MARGIN + block.start_s * scale, (block.end_s - block.start_s) * scale
        words = _words(block)
        lines.append(
            f'<rect x="{x:.2f}" y="{row[block.rank] * (_ROW + _GAP)}" width="{max(long, 0.1):.2f}" '
            f'height="{_ROW}" fill="{_COLOUR.get(block.action, "#999999")}">'
            f"<title>{escape(words)}</title></rect>"
        )
    seconds = f"0 to {timeline.total_s:.4g} s"
    lines.append(f'<text x="{_MARGIN}" y="{height - 6}">{seconds}; {_legend(timeline)}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _legend(timeline: Timeline) -> str:
    names = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
    used = {event.action for event in timeline.events}
    spans = [
        f'<tspan fill="{_COLOUR[action]}">■</tspan> {name}'
        for action, name in {**names, "step": "once per step"}.items()
        if action in used
    ]
    return " ".join(spans)


def _words(block: Block) -> str:
    where = "" if block.stage < 0 else f", stage {block.stage}, micro-batch {block.micro_batch}"
    return f"{block.action}{where}: {1e3 * block.start_s:.3f} to {1e3 * block.end_s:.3f} ms"
