"""What `validate` answers: every row of a table predicted, and the predictions held against measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.cost.constants import Constants
from meshwright.errors import MeshwrightError
from meshwright.validate.described import Run, describe
from meshwright.validate.footprint import memory_bytes
from meshwright.validate.predict import Prepared, predicted, prepare, simulated_times, step_times
from meshwright.validate.progress import Progress, unheard
from meshwright.validate.refusal import Refusal
from meshwright.validate.rows import Row, read_rows
from meshwright.validate.score import Prediction, Scored, score

UNPRICED = "plan: cannot be priced"


@dataclass(frozen=True)
class Priced:
    """A run whose candidates are priced by curves, and its peak memory in the source's own view."""

    prepared: Prepared
    memory_bytes: int | None

    @property
    def run(self) -> Run:
        """The run."""
        return self.prepared.run


@dataclass(frozen=True)
class Table:
    """Every row of a file: the runs that can be predicted, and why the others cannot."""

    name: str
    priced: tuple[Priced, ...]
    refusals: tuple[Refusal, ...]

    def timed(self) -> list[int]:
        """Positions of the runs that have a measured time."""
        return [index for index, one in enumerate(self.priced) if one.run.measured_s]


@dataclass(frozen=True)
class Validation:
    """Predictions of a table's runs, in its order, and what was used for them: `constants` by run, None for
    those of the catalogue."""

    table: Table
    predictions: tuple[Prediction, ...]
    constants: tuple[Constants | None, ...]
    basis: str

    @cached_property
    def document(self) -> dict[str, Any]:
        """The answer, ready for JSON."""
        return score([one.run for one in self.table.priced], self.table.refusals, self.predictions)

    @property
    def scored(self) -> list[Scored]:
        """Each run with its prediction."""
        return [Scored(one.run, p) for one, p in zip(self.table.priced, self.predictions, strict=True)]

    def frameworks(self) -> Counter[tuple[str, str, str]]:
        """How often each framework of the table was taken for which engine and era."""
        return Counter(
            (one.run.row.framework or "not stated", one.run.stated.engine, one.run.era)
            for one in self.table.priced
        )


def read_table(path: str | Path, progress: Progress = unheard) -> Table:
    """Read a table of runs and price each by curves. Raises InputError when the file is none."""
    return table_of(str(path), read_rows(path), progress)


def table_of(name: str, rows: Sequence[Row], progress: Progress = unheard) -> Table:
    """Price each row by curves; `name` is what messages call the table."""
    priced: list[Priced] = []
    refusals: list[Refusal] = []
    for index, row in enumerate(rows):
        progress("rows priced", index, len(rows))
        one = price(row)
        if isinstance(one, Refusal):
            refusals.append(one)
        else:
            priced.append(one)
    progress("rows priced", len(rows), len(rows))
    return Table(name, tuple(priced), tuple(refusals))


def price(row: Row) -> Priced | Refusal:
    """A row priced by curves, or why it is not scored."""
    run = describe(row)
    if isinstance(run, Refusal):
        return run
    try:
        return Priced(prepare(run), memory_bytes(run))
    except MeshwrightError as error:
        return Refusal(row.id, UNPRICED, str(error).splitlines()[0])


def validated(table: Table) -> Validation:
    """Predictions of a table with the catalogue's constants and intervals."""
    found = (predicted(one.run, step_times(one.prepared), one.memory_bytes) for one in table.priced)
    return Validation(table, tuple(found), (None,) * len(table.priced), "the constants of the catalogue")


def with_simulation(validation: Validation, progress: Progress = unheard) -> Validation:
    """The same, with a step of every candidate simulated under the constants of its run's prediction."""
    runs = zip(validation.table.priced, validation.predictions, validation.constants, strict=True)
    found = []
    for done, (one, prediction, values) in enumerate(runs):
        progress("rows simulated", done, len(validation.predictions))
        seconds = float(np.exp(np.median(np.log(simulated_times(one.prepared, values)))))
        found.append(replace(prediction, simulated_s=seconds))
    return replace(validation, predictions=tuple(found))


def worst_rows(scored: Iterable[Scored], count: int = 10) -> list[tuple[Scored, float]]:
    """The runs whose time is predicted worst, with the relative error, the worst first."""
    errors = [
        (s, (s.prediction.step_time_s - s.run.measured_s) / s.run.measured_s)
        for s in scored
        if s.run.measured_s
    ]
    return sorted(errors, key=lambda pair: (-abs(pair[1]), pair[0].run.id))[:count]
