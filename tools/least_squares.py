"""Least squares for positive parameters: Levenberg and Marquardt on their logarithms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

ROUNDS = 300
STEP = 1e-5

Values = Mapping[str, float]
Model = Callable[[Values], np.ndarray]


@dataclass(frozen=True, slots=True)
class Free:
    """A positive parameter: where it starts, its bounds, and how strongly it is held to the start.

    `weight` counts residuals: holding at e times the start costs as much as one point that is off by
    `weight` in log time.
    """

    start: float
    low: float
    high: float
    weight: float = 0.0


def fit(
    model: Model, times: np.ndarray, free: Mapping[str, Free], weights: np.ndarray | None = None
) -> dict[str, float]:
    """The parameters that minimise the squared error of log time; `weights` of the points, 1 unless given."""
    names = list(free)
    low = np.log([free[name].low for name in names])
    high = np.log([free[name].high for name in names])
    start = np.log([free[name].start for name in names])
    held = np.array([free[name].weight for name in names])
    counts = np.ones(len(times)) if weights is None else weights

    def residuals(point: np.ndarray) -> np.ndarray:
        values = dict(zip(names, np.exp(point), strict=True))
        return np.concatenate([counts * np.log(model(values) / times), held * (point - start)])

    point, damping = start.copy(), 1e-2
    errors = residuals(point)
    for _ in range(ROUNDS):
        moves = STEP * np.eye(len(names))
        slopes = np.stack([(residuals(point + move) - errors) / STEP for move in moves], 1)
        square, gradient = slopes.T @ slopes, slopes.T @ errors
        before = float(errors @ errors)
        while damping < 1e12:
            scale = np.diag(damping * (np.diag(square) + 1e-12))
            moved = np.clip(point + np.clip(np.linalg.solve(square + scale, -gradient), -1, 1), low, high)
            found = residuals(moved)
            if found @ found < before:
                break
            damping *= 4
        else:
            break
        point, errors, damping = moved, found, max(damping / 4, 1e-9)
        if before - float(errors @ errors) < 1e-10 * before:
            break
    return {name: float(value) for name, value in zip(names, np.exp(point), strict=True)}


def errors_of(predicted: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """Median and largest relative error of time."""
    errors = np.abs(predicted / times - 1)
    return float(np.median(errors)), float(np.max(errors))
