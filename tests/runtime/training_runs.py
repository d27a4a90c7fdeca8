"""Training as the tests of this folder do it: weights and text that hide no mistake, and what a rank sees."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layouts import LENGTH
from torch import Tensor

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
    """Python's help texts, clause by clause, packed: half of the sequences hold several documents."""
    assert plan.training is not None
    return open_stream(plan.training, plan.workload, plan.model.vocab_size, folder, folder / "cache")


def write_corpus(folder: Path) -> Path:
    """The text that `stream_of` reads; returns the folder."""
    clauses = re.split(r"(?<=[.,;:])\s+|\n\s*\n", "\n\n".join(python_topics()))
    _write(folder / "clauses.txt", "\n\n".join(clauses).encode())
    return folder


def made_once(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, which the first that asks for it makes: processes that test at once share results."""
    if not path.exists():
        _write(path, pickle.dumps(make()))
    return pickle.loads(path.read_bytes())


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


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
    """FP32 masters, and under ZeRO 0 to 2 the weights that forward uses, where they should be the same; and
    the biases that correct routers, which every rank moves."""
    for layer, block in trainer.moe_layers():
        bias = block.router.correction_bias
        if bias is not None:
            region = (trainer.mesh.position("pp"), "bias"), ((0, len(bias)),), 0, len(bias)
            yield Piece(f"layers.{layer}.moe.router.correction_bias", region, bias.clone())
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


def has_several_documents(batch_documents: Tensor) -> float:
    """The share of sequences that hold more than one document."""
    assert batch_documents.shape[1] == LENGTH
    return (batch_documents.amax(1) > 0).double().mean().item()
