"""Training runs that are held against one process, step by step and tensor by tensor.

A relative error is ‖a − b‖₂ / ‖b‖₂ over a whole tensor. Each rank compares what it holds with the same part
of the one process' tensor; the parts' squares add up to the tensor's. Where several ranks hold a part, the
worst of them counts, so that copies which drift apart are seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from layouts import STEPS, Case
from ranks import run_ranks
from torch import Tensor
from training_runs import Piece, Region, Seen, made_once, steps_of, stream_of, trainer_of, weights_of

from meshwright.ir.parameters import parameters
from meshwright.plan import Plan
from meshwright.runtime import moe


@dataclass(frozen=True)
class Reference:
    """The run of one process: every step, the last weights, and how near to a tie a choice of experts came,
    relative to the spread of the scores."""

    steps: list[Seen]
    weights: dict[str, Tensor]
    margin: float

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Whole gradients of a step."""
        return {piece.name: _whole(piece) for piece in self.steps[step].gradients}


def _whole(piece: Piece) -> Tensor:
    ranges = piece.region[1]
    return piece.values.view([stop - start for start, stop in ranges])


# one process


def reference_of(case: Case, optimizer: str, folder: Path) -> Reference:
    """The run of one process that a case is held against."""
    return reference(case.model, case.precision, optimizer, folder)


@cache
def reference(
    model: str, precision: str, optimizer: str, folder: Path, by_place: bool | None = None
) -> Reference:
    """The same, once for all cases with the same model and precision."""
    plan = Case(model, {}, {}, precision).alone(optimizer)
    path = folder / f"reference-{plan.digest}-{by_place}"
    return made_once(path, lambda: run_ranks(1, _alone, plan, folder, by_place)[0])


def _alone(rank: int, plan: Plan, folder: Path, by_place: bool | None) -> Reference:
    trainer = trainer_of(plan, rank, by_place)
    with _watched_margins() as margins:
        steps = list(steps_of(trainer, stream_of(plan, folder), STEPS))
    weights = {piece.name: _whole(piece) for piece in weights_of(trainer)}
    return Reference(steps, weights, min(margins, default=math.inf))


class _watched_margins:  # noqa: N801  a context
    """Lists by how much the last chosen expert was ahead of the first that was not, in each call."""

    def __enter__(self) -> list[float]:
        self.route, found = moe.route, []
        route = self.route

        def watched(logits: Tensor, router: Any, top_k: int, **rest: Any) -> Any:
            routing = route(logits, router, top_k, **rest)
            scores = routing.scores.detach().double()
            if rest.get("correction_bias") is not None:
                scores = scores + rest["correction_bias"].double()
            ahead = scores.gather(1, routing.choices).amin(1)
            others = scores.scatter(1, routing.choices, -math.inf).amax(1)
            if router.num_groups == 1:  # with groups, a better expert may stand in a closed one
                found.append(((ahead - others).amin() / scores.std(1).mean()).item())
            return routing

        moe.route = watched
        return found

    def __exit__(self, *_: object) -> None:
        moe.route = self.route


# many ranks


Squares = dict[tuple[str, Region], float]


@dataclass(frozen=True)
class _Compared:
    """What a rank found: its steps without their gradients, squares of differences, and where it stands."""

    place: tuple[int, int]
    steps: list[Seen]
    gradients: list[Squares]
    weights: Squares


@dataclass
class Errors:
    """The worst relative errors of a run, each with where it was; `routing` whether all choices agreed."""

    loss: float = 0.0
    balance: float = 0.0
    norm: float = 0.0
    gradient: float = 0.0
    weight: float = 0.0
    routing: bool = True
    skips: bool = True
    where: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, error: float, where: str) -> None:
        """Keep an error if it is the worst of its kind so far; what is no number is the worst."""
        error = math.inf if math.isnan(error) else error
        if error > getattr(self, kind):
            setattr(self, kind, error)
            self.where[kind] = where

    def beyond(self, limits: Mapping[str, float]) -> list[str]:
        """What is above its limit, in words."""
        wrong = [
            f"{kind} {getattr(self, kind):.2g} > {limit:g} ({self.where[kind]})"
            for kind, limit in limits.items()
            if getattr(self, kind) > limit
        ]
        wrong += [] if self.routing else ["tokens chose other experts"]
        return wrong if self.skips else [*wrong, "other steps were skipped"]


Mutate = Callable[[], None]
"""Puts a mistake into the process that calls it."""


def compared(
    case: Case, optimizer: str, folder: Path, steps: int = STEPS, mutate: Mutate | None = None
) -> Errors:
    """Train a case and hold it against one process; `mutate` is called on every rank first."""
    return compare(case.plan(optimizer), reference_of(case, optimizer, folder), folder, steps, mutate)


def compare(
    plan: Plan, known: Reference, folder: Path, steps: int = STEPS, mutate: Mutate | None = None
) -> Errors:
    """Train a plan and hold it against a run of one process. Weights are compared after that run's last
    step alone."""
    found = run_ranks(plan.layout.world_size, _compared, plan, known, folder, steps, mutate)
    errors = Errors()
    for step in range(steps):
        _note_sums(errors, [rank.steps[step] for rank in found], [rank.place for rank in found], known, step)
        whole = known.gradients(step)
        for name, error in _by_parameter([rank.gradients[step] for rank in found], whole):
            errors.note("gradient", error, f"step {step}, {name}")
    if steps == len(known.steps):
        for name, error in _by_parameter([rank.weights for rank in found], known.weights):
            errors.note("weight", error, name)
    missing = {param.name for param in parameters(plan.model)} - known.weights.keys()
    if missing:
        raise AssertionError(f"one process has no {sorted(missing)}")
    return errors


def _compared(
    rank: int, plan: Plan, known: Reference, folder: Path, steps: int, mutate: Mutate | None
) -> _Compared:
    if mutate is not None:
        mutate()
    trainer = trainer_of(plan, rank)
    seen: list[Seen] = []
    squares: list[Squares] = []
    for number, step in enumerate(steps_of(trainer, stream_of(plan, folder), steps)):
        squares.append(_squares(step.gradients, known.gradients(number)))
        seen.append(Seen(**{**vars(step), "gradients": []}))
    place = trainer.mesh.position("tp"), trainer.mesh.position("pp")
    return _Compared(place, seen, squares, _squares(weights_of(trainer), known.weights))


def _squares(pieces: Any, whole: Mapping[str, Tensor]) -> Squares:
    found: Squares = {}
    for piece in pieces:
        key = piece.name, piece.region
        found[key] = max(found.get(key, 0.0), piece.square_of_difference(whole[piece.name]))
    return found


def _by_parameter(ranks: list[Squares], whole: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """The error of each parameter on each pipeline rank that holds it. Raises AssertionError where ranks
    together hold less than all of one."""
    worst: dict[tuple[str, Region], float] = defaultdict(float)
    for (name, region), square in chain.from_iterable(rank.items() for rank in ranks):
        worst[name, region] = max(worst[name, region], math.inf if math.isnan(square) else square)
    held: dict[tuple[str, Any], dict[Region, float]] = defaultdict(dict)
    for (name, region), square in worst.items():
        held[name, region[0]][region] = square
    if missing := whole.keys() - {name for name, _ in held}:
        raise AssertionError(f"no rank holds {sorted(missing)}")
    for (name, _), regions in held.items():
        _require_all(name, list(regions), whole[name])
        size = whole[name].double().norm().item()
        error = math.sqrt(sum(regions.values()))
        yield name, error / size if size else (math.inf if error else 0.0)


def _require_all(name: str, regions: list[Region], whole: Tensor) -> None:
    held = torch.zeros(whole.shape, dtype=torch.int64)
    for _, ranges, start, stop in regions:
        part = held[tuple(slice(*run) for run in ranges)]
        flat = part.flatten()
        flat[start:stop] += 1
        part.copy_(flat.view(part.shape))
    if not (held == 1).all():
        raise AssertionError(f"ranks hold elements of {name} {sorted(set(held.flatten().tolist()))} times")


def _note_sums(
    errors: Errors, ranks: list[Seen], places: list[tuple[int, int]], known: Reference, step: int
) -> None:
    right = known.steps[step]
    for kind in ("loss", "balance"):
        sums: dict[int, float] = defaultdict(float)
        for rank, (tp, _) in zip(ranks, places, strict=True):
            sums[tp] += getattr(rank, kind)
        for value in sums.values():
            errors.note(kind, _relative(value, getattr(right, kind)), f"step {step}")
    for rank in ranks:
        if rank.skipped != right.skipped or rank.scale != right.scale:
            errors.skips = False
        elif not right.skipped:
            errors.note("norm", _relative(rank.norm, right.norm), f"step {step}")
    chosen: dict[int, Any] = defaultdict(int)
    for layer, counts in chain.from_iterable(rank.chosen.items() for rank in ranks):
        chosen[layer] = chosen[layer] + counts
    if not all(torch.equal(chosen[layer], counts) for layer, counts in right.chosen.items()):
        errors.routing = False


def _relative(value: float, right: float) -> float:
    return abs(value - right) / abs(right) if right else abs(value)
