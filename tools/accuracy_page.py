"""The text and the plots of docs/accuracy.md, from kept predictions: nothing is predicted here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import jinja2

from meshwright.cost.constants import constants
from meshwright.files import read_yaml
from meshwright.planner.interval import residuals
from plots import histograms, scatter

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILES = tuple(
    DOCS / name for name in ("accuracy.md", "accuracy-time.svg", "accuracy-memory.svg", "accuracy-errors.svg")
)
TITLES = {
    "dense": "dense",
    "moe_full": "MoE, everything stated",
    "moe_partial": "MoE, stated in part",
    "moe_efa": "MoE over EFA",
}
APART = 0.005
"""Relative difference beyond which estimate and simulation are said to differ."""
_BOTH = {"estimated": "held_back_s", "simulated": "simulated_s"}
FEWEST = 3
"""Rows of a source or GPU below which it shares a line with the others like it."""


@dataclass(frozen=True)
class Kept:
    """What the last fit left: predictions row by row, scores, and what people say of the worst rows."""

    rows: Sequence[Mapping[str, str]]
    scores: Mapping[str, Any]
    explanations: Path

    def timed(self) -> list[Mapping[str, str]]:
        """The rows with a measured time."""
        return [row for row in self.rows if row["measured_s"]]


def pages(kept: Kept) -> Iterator[str]:
    """The text of each of FILES."""
    yield _text(kept)
    timed = kept.timed()
    yield scatter(_points(timed, "measured_s", "held_back_s", 1.0), TITLES, "s per step", _seconds)
    weighed = [row for row in kept.rows if row["measured_memory_bytes"]]
    bytes_ = _points(weighed, "measured_memory_bytes", "memory_bytes", 1e-9)
    yield scatter(bytes_, TITLES, "GB", lambda value: f"{value:g}")
    yield histograms(
        {name: [_error(row) for row in timed if row["group"] == name] for name in TITLES}, TITLES
    )


def _points(
    rows: Sequence[Mapping[str, str]], across: str, up: str, unit: float
) -> dict[str, list[tuple[float, float]]]:
    found = {
        name: [(unit * float(row[across]), unit * float(row[up])) for row in rows if row["group"] == name]
        for name in TITLES
    }
    return {name: points for name, points in found.items() if points}


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def _error(row: Mapping[str, str], name: str = "held_back_s") -> float:
    return float(row[name]) / float(row["measured_s"]) - 1


def _text(kept: Kept) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters.update(percent=_percent, signed=_signed, cell=_cell, seconds=_time)
    timed = kept.timed()
    explained = read_yaml(kept.explanations)
    return environment.get_template("accuracy.md.j2").render(
        scores=kept.scores,
        titles=TITLES,
        widths=residuals(),
        constants=list(constants().flat()),
        sources=_summaries(timed, lambda row: row["source"]),
        gpus=_summaries(timed, lambda row: row["gpu"]),
        eras=_summaries(timed, lambda row: row["era"]),
        without_efa=kept.scores["without_efa"],
        apart=_apart(timed),
        inside=mean(float(row["low_s"]) <= float(row["measured_s"]) <= float(row["high_s"]) for row in timed),
        explained=lambda name: " ".join(str(explained.get(name, "not explained")).split()),
    )


def _apart(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Rows whose estimate and simulation differ by more than APART, and the mean errors of both there."""
    found = [row for row in rows if _distance(row) > APART]
    errors = {name: mean(abs(_error(row, key)) for row in found) for name, key in _BOTH.items()}
    return {"rows": len(found), "largest": max(map(_distance, rows)), **errors}


def _distance(row: Mapping[str, str]) -> float:
    """How far a row's simulation lies from its estimate."""
    return abs(float(row["simulated_s"]) / float(row["held_back_s"]) - 1)


def _summaries(
    rows: Iterable[Mapping[str, str]], key: Callable[[Mapping[str, str]], str]
) -> list[tuple[str, int, float, float, float]]:
    """Rows, mean, median and signed error by what `key` says, most rows first; few rows share a line."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(_error(row))
    few = [name for name, errors in found.items() if len(errors) < FEWEST]
    if len(few) > 1:
        found[f"{len(few)} others"] = [error for name in few for error in found.pop(name)]
    table = []
    for name, errors in found.items():
        sizes = [abs(error) for error in errors]
        table.append((name, len(errors), mean(sizes), median(sizes), mean(errors)))
    return sorted(table, key=lambda line: (-line[1], line[0]))


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.1f} %"


def _time(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _cell(text: object) -> str:
    """Text as one table cell of Markdown."""
    return str(text).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
