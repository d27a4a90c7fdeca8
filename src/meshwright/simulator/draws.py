"""Chance in a step: how much slower single ranks are, and how unevenly single layers route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.errors import InputError
from meshwright.model import Model
from meshwright.workload import Lognormal, Routing, RoutingCounts, Zipf

Array = Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Factors e^|σz| with z normal: 1 at best, 1 + 0.8·σ on average for a small σ.

    Raises InputError for a σ outside 0 to 2.
    """

    sigma: float

    def __post_init__(self) -> None:
        """Refuse what is no spread."""
        if not 0 <= self.sigma <= 2:
            raise InputError("sigma", self.sigma, "a spread between 0 (none) and 2", [0.02])

    def draw(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Factors of a shape."""
        factors: np.ndarray = np.exp(self.sigma * np.abs(rng.standard_normal(tuple(shape))))
        return factors


@dataclass(frozen=True, slots=True)
class Histogram:
    """Factors as they were counted: each value with its weight.

    Raises InputError for values that are not positive and for weights that do not go with them.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no histogram."""
        if not self.values or min(self.values) <= 0:
            raise InputError("values", list(self.values), "factors above 0", [[1.0, 1.1]])
        if len(self.weights) != len(self.values) or min(self.weights) < 0 or not sum(self.weights):
            rule = f"one weight of at least 0 for each of {len(self.values)} values, not all 0"
            raise InputError("weights", list(self.weights), rule, [[1.0] * len(self.values)])

    def draw(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Factors of a shape."""
        shares = np.array(self.weights) / sum(self.weights)
        factors: np.ndarray = rng.choice(np.array(self.values), size=tuple(shape), p=shares)
        return factors


Factors = Spread | Histogram
"""Where factors of at least about 1 come from."""


def expert_loads(
    rng: np.random.Generator,
    routing: Routing | Factors,
    model: Model,
    ep: int,
    size: tuple[int, int],
    choices: int,
) -> np.ndarray:
    """Load of the fullest of ep expert ranks over the mean, by layer, sample and micro-batch.

    `size` is (samples, micro-batches), `choices` how many tokens times experts a group sees in a
    micro-batch. Under a Zipf law each layer has one random order of popularity throughout a sample; a
    log-normal draws every micro-batch anew; counts of a histogram are popularity, from which choices are
    drawn, each layer of the model by the next of those counted. Factors are taken as they come, ep at most.
    1 where experts are not divided.
    """
    shape = (model.num_hidden_layers, *size)
    if ep == 1 or not model.is_moe or routing == "balanced":
        return np.ones(shape)
    experts = model.num_experts
    match routing:
        case Spread() | Histogram():
            factors: np.ndarray = np.minimum(routing.draw(rng, shape), ep)
            return factors
        case Lognormal():
            loads = np.exp(routing.lognormal * rng.standard_normal((*shape, experts)))
        case Zipf():
            popular = np.arange(1, experts + 1, dtype=float) ** -routing.zipf
            loads = rng.permuted(np.broadcast_to(popular, (*shape[:2], 1, experts)), axis=-1)
        case RoutingCounts():
            loads = _counted(rng, routing, model, shape, choices)
        case _:
            raise AssertionError("a routing histogram is read before it gets here")
    return np.broadcast_to(_fullest(loads, ep), shape)


def _counted(
    rng: np.random.Generator,
    counts: RoutingCounts,
    model: Model,
    shape: tuple[int, int, int],
    choices: int,
) -> np.ndarray:
    layers: dict[int, np.ndarray] = {}
    for layer, expert, tokens in counts.tokens:
        layers.setdefault(layer, np.zeros(model.num_experts))[expert] += tokens
    popular = [load / load.sum() for _, load in sorted(layers.items()) if load.sum()]
    drawn = [rng.multinomial(choices, popular[i % len(popular)], size=shape[1:]) for i in range(shape[0])]
    return np.stack(drawn).astype(float)


def _fullest(loads: np.ndarray, ep: int) -> np.ndarray:
    by_rank = loads.reshape(*loads.shape[:-1], ep, -1).sum(axis=-1)
    fullest: np.ndarray = by_rank.max(axis=-1) / by_rank.mean(axis=-1)
    return fullest
