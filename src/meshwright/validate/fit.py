"""The fit of the global constants to measured step times, with recipes held back.

Minimises Σ w·|log predicted − log measured| by iteratively reweighted Gauss-Newton steps in logarithms
(shares in logits), with a weak pull towards each constant's starting value. Rows of one recipe share their
weight, and so do groups, so that a source with many rows does not decide alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np

from meshwright.cost.constants import Constants
from meshwright.validate.predict import Prepared, error_of
from meshwright.validate.progress import Progress, unheard

Array = Any

STARTS: dict[str, tuple[float, float]] = {
    "slowdown.ampere": (1.15, 0.3),
    "slowdown.hopper": (1.25, 0.3),
    "slowdown.blackwell": (1.25, 0.3),
    "slowdown.blackwell-ultra": (1.15, 0.3),
    "grouped": (0.9, 0.2),
    "memory": (0.8, 0.15),
    "host.dense": (60e-6, 0.7),
    "host.experts": (120e-6, 0.7),
    "host.graph": (10e-6, 0.3),
    "hidden.tensor": (0.6, 1.0),
    "hidden.data": (0.7, 1.0),
    "hidden.gather": (0.8, 1.0),
    "hidden.expert": (0.6, 1.0),
    "fp8_cast": (0.4, 0.5),
    "network": (1.1, 0.2),
    "efa": (5e-4, 0.7),
    "step.usual": (20e-3, 0.7),
    "step.early": (20e-3, 0.7),
}
"""Starting value of each fitted constant, and how far it may reasonably lie from it (in its logarithm or
logit): what the physics suggest before any run is seen."""

PULL = 0.3
"""Weight of the starting values against the rows."""
_SHARP = 0.05
"""Residuals below this count squared, above it by their size."""
_STEP = 0.1
_LONGEST = 0.7
ITERATIONS, FRESH = 12, 6
"""Iterations of a fit, and those that take derivatives anew; later ones only converge."""
FOLDS, FOLD_ITERATIONS = 10, 6
"""Parts that recipes are held back in, and iterations without one, from the fit of the whole."""
EFA_SHARE = 0.25
"""Weight of rows over EFA: their expert libraries stand in for NVIDIA's and differ by a factor of two."""


@dataclass(frozen=True)
class Fitted:
    """Fitted constants, and how each row's log error moves with each of them."""

    values: dict[str, float]
    jacobian: Array


def weights(rows: Sequence[Prepared]) -> Array:
    """Weight of each row: (rows of its recipe)^−0.2 times (rows of its group)^−0.2, less over EFA.

    Between one weight a row, which the largest sources decide, and one a recipe, which single rows would.
    """
    recipes = Counter(row.run.recipe for row in rows)
    groups = Counter(row.run.group for row in rows)
    even = [(groups[row.run.group] * recipes[row.run.recipe]) ** -0.2 for row in rows]
    efa = [EFA_SHARE if row.run.group == "moe_efa" else 1.0 for row in rows]
    return np.array(even) * np.array(efa)


def fit(
    rows: Sequence[Prepared],
    base: Constants,
    iterations: int = ITERATIONS,
    progress: Progress = unheard,
) -> Fitted:
    """Fit the constants to rows that have a measured time. Derivatives are taken anew in the first FRESH
    iterations."""
    centre, width = _starts()
    names, x, share = list(STARTS), centre, _shares(rows)
    jacobian: Array = None
    for iteration in range(iterations):
        if iteration < FRESH:  # the point itself, and one step along each constant
            points = x[:, None] + _STEP * np.eye(len(x), len(x) + 1, k=1)
            found = _errors(rows, base, points, _told(progress, iteration, iterations))
            errors, jacobian = found[:, 0], (found[:, 1:] - found[:, :1]) / _STEP
        else:
            errors = _errors(rows, base, x[:, None], _told(progress, iteration, iterations))[:, 0]
        x = x + _move(x - centre, width, errors, jacobian, share)
    return Fitted(
        {name: float(_decoded(name, value)) for name, value in zip(names, x, strict=True)}, jacobian
    )


def _told(progress: Progress, iteration: int, iterations: int) -> Progress:
    return lambda what, done, of: progress(what, iteration * of + done, iterations * of)


def _move(offset: Array, width: Array, errors: Array, jacobian: Array, share: Array) -> Array:
    """One Gauss-Newton step; `offset` is how far the values lie from where they start."""
    weight = share / np.maximum(np.abs(errors), _SHARP)
    pull = PULL / width**2
    curvature = jacobian.T @ (weight[:, None] * jacobian) + np.diag(pull)
    slope = jacobian.T @ (weight * errors) + pull * offset
    return -np.clip(np.linalg.solve(curvature, slope), -_LONGEST, _LONGEST)


def _starts() -> tuple[Array, Array]:
    """The starting values, encoded, and how far each may lie from it."""
    centre = np.array([_encoded(name, value) for name, (value, _) in STARTS.items()])
    return centre, np.array([width for _, width in STARTS.values()])


def _shares(rows: Sequence[Prepared]) -> Array:
    share = weights(rows)
    return share / share.mean()


def _errors(rows: Sequence[Prepared], base: Constants, points: Array, progress: Progress) -> Array:
    """Log errors by row and point; `points` holds encoded values by constant and point."""
    values = at_points(base, points)
    found = []
    for index, row in enumerate(rows):
        progress("constants fitted", index, len(rows))
        found.append(np.broadcast_to(error_of(row, values), points.shape[1:]))
    return np.stack(found)


def at_points(base: Constants, points: Array) -> Constants:
    """Constants whose fitted values are arrays, one element a point."""
    changed = base
    for name, at in zip(STARTS, points, strict=True):
        changed = changed.replaced(name, {"value": _decoded(name, at)})
    return changed


def is_share(name: str) -> bool:
    """Whether a constant lies between 0 and 1, so that its logit is fitted and not its logarithm."""
    return name.startswith("hidden.")


def _encoded(name: str, value: float) -> float:
    return log(value / (1 - value)) if is_share(name) else log(value)


def _decoded(name: str, x: Array) -> Array:
    return 1 / (1 + np.exp(-x)) if is_share(name) else np.exp(x)


def folds(rows: Sequence[Prepared], count: int = FOLDS) -> list[list[int]]:
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
    """Constants fitted without one fold, and the rows of that fold with their log errors under them."""

    rows: list[int]
    values: dict[str, float]
    errors: Array


def cross_validated(
    rows: Sequence[Prepared], base: Constants, whole: Fitted, progress: Progress = unheard
) -> list[HeldBack]:
    """Constants for each fold of recipes, fitted on all the others, starting from the fit of the whole.

    All folds move in step, so that one pass over the rows serves them all; the derivatives are those of the
    whole.
    """
    parts = [part for part in folds(rows) if part]
    centre, width = _starts()
    first = np.array([_encoded(name, whole.values[name]) for name in STARTS])
    points = np.repeat(first[:, None], len(parts), axis=1)
    kept = [np.setdiff1d(np.arange(len(rows)), part) for part in parts]
    shares = [_shares([rows[index] for index in own]) for own in kept]
    for iteration in range(FOLD_ITERATIONS + 1):
        errors = _errors(rows, base, points, _told(progress, iteration, FOLD_ITERATIONS + 1))
        if iteration == FOLD_ITERATIONS:
            break
        moves = [
            _move(points[:, k] - centre, width, errors[own, k], whole.jacobian[own], share)
            for k, (own, share) in enumerate(zip(kept, shares, strict=True))
        ]
        points = points + np.stack(moves, axis=1)
    return [
        HeldBack(
            part,
            {n: float(_decoded(n, x)) for n, x in zip(STARTS, points[:, k], strict=True)},
            errors[part, k],
        )
        for k, part in enumerate(parts)
    ]
