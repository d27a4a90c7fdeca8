"""A fit of the constants on a table: how far folds disagree, and what held-back recipes say of each of them.

Every prediction here comes from constants that were fitted without the row's own recipe, and every interval
from the residuals of other recipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, sqrt
from typing import Any

import numpy as np

from meshwright.cost.constants import Constants
from meshwright.errors import InputError
from meshwright.files import to_yaml
from meshwright.planner.interval import Residual, residuals
from meshwright.validate.answer import Table, Validation
from meshwright.validate.described import GROUPS, Run
from meshwright.validate.fit import STARTS, Fitted, HeldBack, cross_validated, fit, is_share
from meshwright.validate.predict import Prepared, predicted, simulated, spread, step_times
from meshwright.validate.progress import Progress, unheard

Array = Any
INSIDE = 0.8
"""Share of measurements that an interval holds."""
MOVED = 0.1
"""Least |d log time / d log constant| of a row that says something of a constant."""
FEWEST_ROWS, FEWEST_RECIPES = 20, 5
_UNMOVED = 0.01
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Support:
    """What folds say of a constant: its range, and the mean error of held-back rows that it moves."""

    low: float
    high: float
    folds: int
    rows: int
    error: float | None

    def __str__(self) -> str:
        text = f"between {self.low:.3g} and {self.high:.3g} over {self.folds} folds; "
        if self.error is None:
            return text + "it moves no row by a tenth of its own change"
        return text + (
            f"mean error on held-back recipes of the {self.rows} rows it moves "
            f"(|d log t / d log c| > {MOVED:g}): {100 * self.error:.1f} %"
        )


@dataclass(frozen=True)
class Refit:
    """Constants fitted on a table, and on each part of it that leaves some recipes out.

    `rows` are the positions of the table's timed runs, `timed` these as they were fitted; `HeldBack.rows`
    count among them.
    """

    table: Table
    base: Constants
    rows: list[int]
    timed: list[Prepared]
    whole: Fitted
    folds: list[HeldBack]

    @cached_property
    def errors(self) -> Array:
        """Log errors of the timed runs, each under constants that were fitted without its recipe."""
        found = np.empty(len(self.rows))
        for fold in self.folds:
            found[fold.rows] = fold.errors
        return found

    @cached_property
    def _spreads(self) -> Array:
        """What the candidates of the timed runs add to their intervals, under the fit of the whole."""
        values = self.base.changed(self.whole.values)
        return np.array([spread(step_times(one, values)) for one in self.timed])

    def constants(self) -> Constants:
        """The fitted constants, each with the rows and the folds that stand behind it; what no row moves
        keeps the base's entry."""
        recipes = len({one.run.recipe for one in self.timed})
        how = " --simulate" if any(one.beyond for one in self.timed) else ""
        rows = f"fitted to {len(self.rows)} rows of {recipes} recipes with meshwright validate --fit{how}; "
        changed = self.base
        for name, support in self.supports().items():
            value = float(f"{self.whole.values[name]:.{_DIGITS}g}")
            changed = changed.replaced(name, {"value": value, "source": rows + str(support)})
        return changed

    def supports(self) -> dict[str, Support]:
        """What stands behind each constant that some row moves."""
        found = {}
        for index, name in enumerate(STARTS):
            moves = np.abs(self._moves(index))
            if moves.max() < _UNMOVED:
                continue
            values = [fold.values[name] for fold in self.folds]
            errors = np.abs(np.expm1(self.errors[moves > MOVED]))
            error = float(errors.mean()) if errors.size else None
            found[name] = Support(min(values), max(values), len(values), errors.size, error)
        return found

    def _moves(self, index: int) -> Array:
        """d log time / d log constant of the timed runs; shares are fitted as logits."""
        name = list(STARTS)[index]
        column = self.whole.jacobian[:, index]
        return column / (1 - self.whole.values[name]) if is_share(name) else column

    def residuals(self) -> dict[str, Residual]:
        """Half-widths of the 80 % interval by group, and by group and generation of GPU where enough rows
        stand behind one; a group without rows keeps the catalogue's."""
        found: dict[str, Residual] = {n: entry for n, entry in residuals().items() if n in GROUPS}
        for name in self._names():
            width, rows = self._width(name, frozenset())
            if width is not None:
                found[name] = Residual(half_width=round(width, 3), rows=rows)
        return dict(sorted(found.items(), key=lambda item: (GROUPS.index(item[0].split("/")[0]), item[0])))

    def _names(self) -> list[str]:
        """Groups, and groups on a generation of GPUs, that some row is of."""
        return sorted({name for one in self.timed for name in _likes(one.run)})

    def _width(self, name: str, held: frozenset[int]) -> tuple[float | None, int]:
        """The half-width of rows of a name but for those held back, and how many they are; None where there
        are none, or of a part of a group too few."""
        own = [k for k, one in enumerate(self.timed) if name in _likes(one.run) and k not in held]
        recipes = {self.timed[k].run.recipe for k in own}
        enough = len(own) >= FEWEST_ROWS and len(recipes) >= FEWEST_RECIPES
        if not own or (name not in GROUPS and not enough):
            return None, len(own)
        return half_width(self.errors[own], self._spreads[own]), len(own)

    def validation(self) -> Validation:
        """Every run of the table predicted by constants fitted without its recipe, in an interval as wide as
        the residuals of the recipes outside its fold. Runs whose recipe is in no fold take the whole fit."""
        fold_of = {self.timed[k].run.recipe: fold for fold in self.folds for k in fold.rows}
        values = {id(fold): self.base.changed(fold.values) for fold in self.folds}
        whole = self.base.changed(self.whole.values)
        widths = self._widths()
        found, used = [], []
        for one in self.table.priced:
            fold = fold_of.get(one.run.recipe)
            used.append(values[id(fold)] if fold else whole)
            times = step_times(one.prepared, used[-1])
            known = [widths[id(fold), name] for name in _likes(one.run)] if fold else []
            width = next((one_width for one_width in known if one_width is not None), None)
            found.append(predicted(one.run, times, one.memory_bytes, width))
        basis = f"constants fitted without the row's recipe, in {len(self.folds)} folds"
        return Validation(self.table, tuple(found), tuple(used), basis)

    def _widths(self) -> dict[tuple[int, str], float | None]:
        """Half-widths by fold and name from all other folds; None where they have too few rows of it."""
        return {
            (id(fold), name): self._width(name, frozenset(fold.rows))[0]
            for fold in self.folds
            for name in {*self._names(), *GROUPS}
        }


def _likes(run: Run) -> tuple[str, str]:
    """Names of the rows that are like a run: of its group on its generation of GPUs, and of its group."""
    return f"{run.group}/{run.generation}", run.group


def refit(table: Table, base: Constants, progress: Progress = unheard, by_simulation: bool = False) -> Refit:
    """Fit the constants on a table's timed runs, and again without each fold of recipes: to the estimate,
    or `by_simulation` to simulated step times.

    Raises InputError where there are too few to tell.
    """
    rows = table.timed()
    timed = [table.priced[index].prepared for index in rows]
    recipes = {one.run.recipe for one in timed}
    if len(rows) < FEWEST_ROWS or len(recipes) < FEWEST_RECIPES:
        rule = f"a fit needs at least {FEWEST_ROWS} rows with a step time, of {FEWEST_RECIPES} recipes"
        raise InputError(table.name, f"{len(rows)} rows of {len(recipes)} recipes", rule)
    if by_simulation:
        timed = _simulated(timed, base, progress)
    whole = fit(timed, base, progress=progress)
    return Refit(table, base, rows, timed, whole, cross_validated(timed, base, whole, progress))


def _simulated(timed: Sequence[Prepared], base: Constants, progress: Progress) -> list[Prepared]:
    found = []
    for done, one in enumerate(timed):
        progress("rows simulated", done, len(timed))
        found.append(simulated(one, base))
    return found


def half_width(errors: Sequence[float], spreads: Sequence[float]) -> float:
    """Half of the interval that holds 80 % of some log errors, beside what the spread of a row's candidates
    adds: the quantile of e² − s² with the correction of (n + 1), under the root.

    A row is inside when |e| ≤ √(w² + s²), so the quantile makes the count right.
    """
    squares = np.sort(np.square(errors) - np.square(spreads))
    place = min(ceil(INSIDE * (len(squares) + 1)), len(squares))
    return sqrt(max(float(squares[place - 1]), 0.0))


_CONSTANTS_HEAD = """\
# Global constants of the step-time model beyond the kernel and link curves: at most 20.
# Written by `meshwright validate RUNS.csv --fit FILE`; what begins `assumed:` is no fit.
"""
_RESIDUALS_HEAD = """\
# Half of the 80 % interval of log(predicted / measured) by group of runs, on recipes held back from the fit.
# Written by `meshwright validate RUNS.csv --residuals FILE`.
"""


def constants_text(values: Constants) -> str:
    """The file that `cost/constants.py` reads."""
    return _CONSTANTS_HEAD + to_yaml(values.model_dump(mode="json"))


def residuals_text(found: Mapping[str, Residual]) -> str:
    """The file that `planner/interval.py` reads."""
    return _RESIDUALS_HEAD + to_yaml({name: entry.model_dump(mode="json") for name, entry in found.items()})
