"""How well two predictions tell two measured runs apart: what decisions 0011 and 0012 rest on.

Reads the kept predictions with recipes held back (benchmarks/accuracy/held_back.csv) and the runs themselves.
Intervals are those of the shipped residuals, unwidened. `python benchmarks/comparisons.py`.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log
from pathlib import Path

from meshwright.planner.interval import half_width_of

FOLDER = Path(__file__).resolve().parent / "accuracy"
GROUPS = ("dense", "moe_full", "moe_partial", "moe_efa")
RECIPE = ("source", "model", "gpu", "precision", "seq_len")
JOB = (*RECIPE, "n_gpus", "gbs")
DIFFERENT = log(1.02)


@dataclass(frozen=True, slots=True)
class Run:
    """One timed run: what it is, and the logarithms of its measured and predicted seconds."""

    row: dict[str, str]
    group: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Logarithm of predicted over measured."""
        return self.predicted - self.measured


def read_runs() -> list[Run]:
    """Every timed run with its prediction."""
    rows = {row["id"]: row for row in csv.DictReader((FOLDER / "training_runs.csv").open(encoding="utf-8"))}
    found = []
    for kept in csv.DictReader((FOLDER / "held_back.csv").open(encoding="utf-8")):
        if kept["measured_s"] and kept["held_back_s"]:
            measured, predicted = log(float(kept["measured_s"])), log(float(kept["held_back_s"]))
            found.append(Run(rows[kept["id"]], kept["group"], measured, predicted))
    return found


def pairs(runs: Sequence[Run], alike: Sequence[str]) -> Iterator[tuple[Run, Run]]:
    """Pairs of runs with equal values of some columns."""
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(run.row[column] for column in alike)].append(run)
    for members in groups.values():
        yield from combinations(members, 2)


def quantile(values: Sequence[float], share: float = 0.8) -> float:
    """The value that a share of the others does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def right(pair: tuple[Run, Run]) -> bool:
    """Whether the faster of two runs is predicted faster."""
    one, other = pair
    return (one.predicted < other.predicted) == (one.measured < other.measured)


def show_ties(runs: Sequence[Run], group: str) -> None:
    """Pairs of one job: how many are apart, how many tie, and how each kind is ranked."""
    reach = 2 * half_width_of(group)
    of_job = list(pairs(runs, JOB))
    timed = [(a, b) for a, b in of_job if abs(a.measured - b.measured) > DIFFERENT]
    apart = [(a, b) for a, b in timed if abs(a.predicted - b.predicted) > reach]
    tied = [(a, b) for a, b in timed if abs(a.predicted - b.predicted) <= reach]
    words = [
        f"{len(found)} {name}"
        + (f" ({100 * sum(map(right, found)) / len(found):.0f} % right)" if found else "")
        for name, found in (("apart", apart), ("tied", tied))
    ]
    if of_job:
        ratio = exp(quantile([abs(a.error - b.error) for a, b in of_job]))
        words.append(f"80 % of {len(of_job)} ratios within {ratio:.2f}")
    print(f"  {group:<12} one step within {exp(half_width_of(group)):.2f}; {', '.join(words)}")


def show_scaling(runs: Sequence[Run], group: str) -> tuple[int, int]:
    """Pairs of one recipe on other numbers of GPUs: how many ratios lie within one step's interval."""
    found = [(a, b) for a, b in pairs(runs, RECIPE) if a.row["n_gpus"] != b.row["n_gpus"]]
    inside = sum(abs(a.error - b.error) <= half_width_of(group) for a, b in found)
    if found:
        print(f"  {group:<12} {inside} of {len(found)} ratios ({100 * inside / len(found):.0f} %)")
    return inside, len(found)


def main() -> None:
    """Print both tables."""
    runs = read_runs()
    print("Two layouts of one job (decision 0012)")
    for group in GROUPS:
        show_ties([run for run in runs if run.group == group], group)
    print("One recipe on two numbers of GPUs, within one step's interval (decision 0011)")
    counts = [show_scaling([run for run in runs if run.group == group], group) for group in GROUPS]
    inside, total = (sum(column) for column in zip(*counts, strict=True))
    print(f"  {'all':<12} {inside} of {total} ratios ({100 * inside / total:.1f} %)")


if __name__ == "__main__":
    main()
