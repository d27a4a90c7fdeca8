"""The table of published runs that stands in the repository."""

from __future__ import annotations

import csv
from pathlib import Path

ACCURACY = Path(__file__).parents[2] / "benchmarks" / "accuracy"


def rows_of(name: str) -> list[dict[str, str]]:
    with (ACCURACY / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_completed_cells_stand_in_the_table_with_their_sources() -> None:
    runs = {row["id"]: row for row in rows_of("training_runs.csv")}
    completed = rows_of("completed.csv")
    assert {(row["id"], row["column"]): runs[row["id"]][row["column"]] for row in completed} == {
        (row["id"], row["column"]): row["value"] for row in completed
    }
    assert all(row["source_path"] and row["source_commit"] for row in completed)
    sources = (ACCURACY / "SOURCES.md").read_text("utf-8")
    assert f"| `completed.csv` | {len(completed)} cells |" in sources
