"""The fit of the global constants to measured step times, with recipes held back.

Minimises Σ w·|log predicted − log measured| by iteratively reweighted Gauss-Newton steps in logarithms
(shares in logits), with a weak pull towards each constant's starting value. Rows of one recipe share their
weight, and so do groups, so that a source with many rows does not decide alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np

from meshwright.cost.constants import Constants
from meshwright.validate.predict import Prepared, error_of

Array = Any

STARTS: dict[str, tuple[float, float]] = {
    "slowdown.ampere": (1.15, 0.3),
    "slowdown.hopper": (1.25, 0.3),
    "slowdown.blackwell": (1.25, 0.3),
    "slowdown.blackwell-ultra": (1.15, 0.3),
    "grouped": (0.9, 0.2),
    "memory": (0.8, 0.15),
    "host.dense": (60e-6, 0.7),
    "host.early": (100e-6, 0.7),
    "host.experts": (120e-6, 0.7),
    "host.graph": (10e-6, 0.3),
    "hidden.tensor": (0.6, 1.0),
    "hidden.data": (0.7, 1.0),
    "hidden.gather": (0.8, 1.0),
    "hidden.expert": (0.6, 1.0),
    "fp8_cast": (0.4, 0.5),
    "network": (1.1, 0.2),
    "step": (20e-3, 0.7),
}
"""Starting value of each fitted constant, and how far it may reasonably lie from it (in its logarithm or
logit): what the physics suggest before any run is seen."""

PULL = 0.3
"""Weight of the starting values against the rows."""
_SHARP = 0.05
"""Residuals below this count squared, above it by their size."""
_STEP = 0.1
_LONGEST = 0.7
FRESH = 6
"""Iterations that take derivatives anew; later ones only converge."""
EFA_SHARE = 0.25
"""Weight of rows over EFA: their expert libraries stand in for NVIDIA's and differ by a factor of two."""


@dataclass(frozen=True)
class Fitted:
    """Fitted constants, and how each row's log error moves with each of them."""

    values: dict[str, float]
    jacobian: Array


def weights(rows: Sequence[Prepared]) -> Array:
    """Weight of each row: (rows of its recipe)^−0.3 times (rows of its group)^−0.3, less over EFA.

    Between one weight a row, which the largest sources decide, and one a recipe, which single rows would.
    """
    recipes = Counter(row.run.recipe for row in rows)
    groups = Counter(row.run.group for row in rows)
    even = [(groups[row.run.group] * recipes[row.run.recipe]) ** -0.3 for row in rows]
    efa = [EFA_SHARE if row.run.group == "moe_efa" else 1.0 for row in rows]
    return np.array(even) * np.array(efa)


def fit(
    rows: Sequence[Prepared],
    base: Constants,
    iterations: int = 12,
    start: Fitted | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Fitted:
    """Fit the constants to rows that have a measured time.

    Derivatives are taken anew in the first FRESH iterations. With `start`, its derivatives are kept and only
    the values move: cheap, and good enough for a subset.
    """
    names = list(STARTS)
    centre = np.array([_encoded(name, STARTS[name][0]) for name in names])
    width = np.array([STARTS[name][1] for name in names])
    x = centre if start is None else np.array([_encoded(n, start.values[n]) for n in names])
    share = weights(rows)
    share = share / share.mean()
    jacobian: Array = None if start is None else start.jacobian
    for iteration in range(iterations):
        errors = _errors(rows, base, names, x)
        progress(f"iteration {iteration + 1}: mean error {np.mean(np.abs(np.expm1(errors))):.1%}")
        if start is None and iteration < FRESH:
            jacobian = _derivatives(rows, base, names, x, errors)
        weight = share / np.maximum(np.abs(errors), _SHARP)
        pull = PULL / width**2
        curvature = jacobian.T @ (weight[:, None] * jacobian) + np.diag(pull)
        slope = jacobian.T @ (weight * errors) + pull * (x - centre)
        x = x - np.clip(np.linalg.solve(curvature, slope), -_LONGEST, _LONGEST)
    return Fitted({name: _decoded(name, value) for name, value in zip(names, x, strict=True)}, jacobian)


def _errors(rows: Sequence[Prepared], base: Constants, names: Sequence[str], x: Array) -> Array:
    values = base.changed({name: _decoded(name, value) for name, value in zip(names, x, strict=True)})
    return np.array([error_of(row, values) for row in rows])


def _derivatives(
    rows: Sequence[Prepared], base: Constants, names: Sequence[str], x: Array, errors: Array
) -> Array:
    columns = []
    for index in range(len(names)):
        moved = x.copy()
        moved[index] += _STEP
        columns.append((_errors(rows, base, names, moved) - errors) / _STEP)
    return np.stack(columns, axis=1)


def _is_share(name: str) -> bool:
    return name.startswith("hidden.")


def _encoded(name: str, value: float) -> float:
    return log(value / (1 - value)) if _is_share(name) else log(value)


def _decoded(name: str, x: float) -> float:
    return 1 / (1 + exp(-x)) if _is_share(name) else exp(x)


def folds(rows: Sequence[Prepared], count: int = 10) -> list[list[int]]:
    """Rows by fold: whole recipes, the largest first, each to the fold that has fewest rows so far."""
    recipes: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        recipes.setdefault(row.run.recipe, []).append(index)
    parts: list[list[int]] = [[] for _ in range(count)]
    for recipe in sorted(recipes, key=lambda name: (-len(recipes[name]), name)):
        min(parts, key=len).extend(recipes[recipe])
    return parts


@dataclass(frozen=True)
class HeldBack:
    """Constants fitted without one fold, and the rows of that fold."""

    rows: list[int]
    values: dict[str, float]


def cross_validated(rows: Sequence[Prepared], base: Constants, whole: Fitted) -> list[HeldBack]:
    """Constants for each fold of recipes, fitted on all the others, starting from the fit of the whole."""
    found = []
    for part in folds(rows):
        held = set(part)
        kept = [index for index in range(len(rows)) if index not in held]
        start = Fitted(whole.values, whole.jacobian[kept])
        values = fit([rows[index] for index in kept], base, iterations=6, start=start).values
        found.append(HeldBack(part, values))
    return found
