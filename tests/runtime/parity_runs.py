"""Training runs that are held against one process, step by step and tensor by tensor.

A relative error is ‖a − b‖₂ / ‖b‖₂ over a whole tensor. Each rank compares what it holds with the same part
of the one process' tensor; the parts' squares add up to the tensor's. Where several ranks hold a part, the
worst of them counts, so that copies which drift apart are seen.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from layouts import LENGTH, STEPS, Case
from ranks import run_ranks
from torch import Tensor

from meshwright.ir.parameters import parameters
from meshwright.plan import Plan
from meshwright.runtime import moe
from meshwright.runtime.data import DataStream, open_stream
from meshwright.runtime.data.formats import python_topics
from meshwright.runtime.initial import initial_values
from meshwright.runtime.mesh import Mesh, build_mesh, single_process
from meshwright.runtime.routing import Decision
from meshwright.runtime.shares import Held
from meshwright.runtime.step import Trainer, inputs_of, rows_of_rank

LARGER = 3.0
"""Times the usual first weights: scores of attention and router are then far from uniform, and gradients are
no differences of nearly equal numbers."""
_CROWDED = (0.6, 0.4, 0.2, 0.0, -9.0, -9.0, -9.0, -9.0)
"""First biases of the uneven router, whose scores spread by 0.3: half of a layer's experts get nothing, and
the others unlike shares; each layer prefers other experts."""

Region = tuple[tuple[int, str], tuple[tuple[int, int], ...], int, int]
"""The pipeline rank that holds a part and what it is of, its ranges in the whole parameter, and the run of
elements of them."""


@dataclass(frozen=True)
class Piece:
    """A part of a parameter, of its gradient or of its values, flat."""

    name: str
    region: Region
    values: Tensor

    def square_of_difference(self, whole: Tensor) -> float:
        """‖own − the same part of the whole‖²."""
        _, ranges, start, stop = self.region
        same = whole[tuple(slice(*run) for run in ranges)].flatten()[start:stop]
        return (self.values.double() - same.double()).square().sum().item()


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a step. `loss` and `balance` are its parts of sums over the ranks that stand at
    the same place along tp; `chosen` its part of the copies by layer and expert."""

    loss: float
    norm: float
    skipped: bool
    scale: float
    balance: float
    chosen: dict[int, Tensor]
    gradients: list[Piece]


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


# what every rank does


def first_values(plan: Plan) -> Callable[[Held], Tensor]:
    """First weights that do not hide mistakes: larger ones, and crowded experts where a router has a bias
    that should not be even."""
    assert plan.training is not None
    seed, uneven = plan.training.seed, plan.model.router.bias and plan.model.router.normalize

    def give(held: Held) -> Tensor:
        values = initial_values(plan.model, held.param, held.slice, seed)
        if len(held.param.shape) > 1:
            values = values * LARGER
        if uneven and held.name.endswith("router.bias"):
            layer = int(held.name.split(".")[1])
            values = values + torch.tensor(_CROWDED).roll(2 * layer)
        return values

    return give


def mesh_of(plan: Plan, rank: int) -> Mesh:
    """A rank's mesh on the CPU."""
    device = torch.device("cpu")
    if plan.layout.world_size == 1:
        return single_process(device)
    return build_mesh(plan.layout, rank, device, plan.model.kv_heads)


def trainer_of(plan: Plan, rank: int, by_place: bool | None = None, **options: Any) -> Trainer:
    """A rank's trainer with those weights, and a correction bias where the router has one. `by_place`, by
    default in half precision: experts do not follow from scores."""
    if by_place is None:
        by_place = plan.workload.precision != "fp32"
    if by_place:
        _choose_by_place()
        options["routes_evenly"] = True
    trainer = Trainer(plan, mesh_of(plan, rank), first_values(plan), **options)
    for layer, block in trainer.moe_layers():
        if block.router.correction_bias is not None:
            numbers = torch.arange(plan.model.num_experts) + layer
            block.router.correction_bias.copy_(0.1 * (numbers * 0.7).sin())
    return trainer


def _choose_by_place() -> None:
    """In this process, "even" choices follow from a token's place in its document, whatever the layout."""
    routed = moe.MoE._routed

    def remembered(self: Any, logits: Tensor, tokens: Any) -> Any:
        self.place_T = self.setting.own_tokens(tokens.positions_SB).flatten()
        return routed(self, logits, tokens)

    def chosen(self: Any, logits: Tensor, valid: Tensor | None) -> Decision:
        top_k, experts = self.setting.model.num_experts_per_tok, logits.shape[1]
        return Decision((self.place_T[:, None] * top_k + torch.arange(top_k) + self.layer) % experts)

    moe.MoE._routed, moe.MoE._even = remembered, chosen  # type: ignore[method-assign]


def stream_of(plan: Plan, folder: Path) -> DataStream:
    """Python's help texts, clause by clause, packed: most sequences hold several documents."""
    assert plan.training is not None
    return open_stream(plan.training, plan.workload, plan.model.vocab_size, folder, folder / "cache")


def write_corpus(folder: Path) -> Path:
    """The text that `stream_of` reads; returns the folder."""
    clauses = re.split(r"(?<=[.,;:])\s+|\n\s*\n", "\n\n".join(python_topics()))
    (folder / "clauses.txt").write_text("\n\n".join(clauses), "utf-8")
    return folder


def steps_of(trainer: Trainer, stream: DataStream, count: int) -> Iterator[Seen]:
    """Train; what each step showed."""
    rows = rows_of_rank(trainer.plan, trainer.mesh)
    caught = _catch_gradients(trainer)
    for _ in range(count):
        result = trainer.step(*inputs_of(stream.next(rows), trainer.mesh.device))
        blocks = list(trainer.moe_layers())
        yield Seen(
            result.loss.item(),
            result.outcome.grad_norm,
            result.outcome.skipped,
            trainer.scaler.scale,
            sum(float(block.balance) for _, block in blocks if block.balance is not None),
            {layer: block.counts.offered.clone() for layer, block in blocks if block.counts is not None},
            list(caught),
        )


def _catch_gradients(trainer: Trainer) -> list[Piece]:
    """A list that holds the reduced gradients of the latest step, without the loss scale."""
    caught: list[Piece] = []
    store = trainer.replica.store
    reduce = store.reduce_gradients

    def reduced() -> None:
        reduce()
        scale = trainer.scaler.scale
        caught[:] = [
            _piece(trainer, share.held, share.gradient / scale, "gradient", share.start)
            for share in store.shares
        ]

    store.reduce_gradients = reduced  # type: ignore[method-assign]
    return caught


def weights_of(trainer: Trainer) -> Iterator[Piece]:
    """FP32 masters; and under ZeRO 0 to 2 the weights that forward uses, where they should be the same."""
    for share in trainer.replica.store.shares:
        yield _piece(trainer, share.held, share.master.clone(), "master", share.start)
    if trainer.plan.policy.zero_stage < 3 and trainer.plan.workload.precision == "fp32":
        for held in trainer.replica.held:
            yield _piece(trainer, held, held.tensor.detach().flatten().clone(), "weight", 0)


def _piece(trainer: Trainer, held: Held, values: Tensor, kind: str, start: int) -> Piece:
    """Without the rows that only pad a vocabulary: they stand last."""
    real = math.prod(held.slice.shape)
    stop = min(start + values.numel(), real)
    holder = trainer.mesh.position("pp"), kind
    region = holder, held.slice.ranges, min(start, real), stop
    return Piece(held.name, region, values[: max(0, stop - start)])


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
    return run_ranks(1, _alone, plan, folder, by_place)[0]


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


def has_several_documents(batch_documents: Tensor) -> float:
    """The share of sequences that hold more than one document."""
    assert batch_documents.shape[1] == LENGTH
    return (batch_documents.amax(1) > 0).double().mean().item()
