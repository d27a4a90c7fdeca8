"""An overflow under fp16 in one expert of one rank: every rank skips the step, and only the scale changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from layouts import Case, _case, limits
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from training_runs import stream_of, trainer_of, weights_of

from meshwright.plan import Plan
from meshwright.runtime.step import Trainer, inputs_of, rows_of_rank

STEPS = 8
BAD_STEPS = (2, 3, 5)
EXPERT = "layers.2.moe.experts.up"
"""Which the last rank holds part of in every layout here."""
SCALES = {"initial": 1024.0, "window": 2, "hysteresis": 2, "minimum": 1.0}
EXPECTED_SCALES = [1024.0, 2048.0, 2048.0, 1024.0, 1024.0, 512.0, 512.0, 1024.0]
"""After each step. Two clean steps double it; the first overflow is forgiven, the second halves, and so does
the third: a clean step in between is too few to forgive again. The last two steps are clean."""
WARM = {"warmup_steps": 4, "steps": 20, "momentum": 0.5, "loss_scale": SCALES}

LAYOUTS = (
    _case("gated", "dp4 ep4", "z0", "mb2", "fp16"),
    _case("gated", "dp4 ep2", "z1", "mb2", "fp16"),
    _case("gated", "dp4 ep2", "z3", "mb2", "fp16"),
    _case("gated", "tp2", "z1", "mb8", "fp16"),
    _case("gated", "pp2 dp2 ep2", "z2", "1F1B", "fp16"),
    _case("gated", "pp2 dp2 ep2 vpp2", "z1", "ZBVZeroBubble", "fp16"),
)


@dataclass(frozen=True)
class After:
    """One rank after a step. `state` is everything that a skipped step must leave."""

    skipped: bool
    scale: float
    updates: int
    learning_rate: float
    state: list[Tensor]


def train(rank: int, plan: Plan, folder: Path, bad_rank: int) -> tuple[list[After], Any]:
    trainer = trainer_of(plan, rank)
    stream, rows = stream_of(plan, folder), rows_of_rank(plan, trainer.mesh)
    seen = []
    for step in range(STEPS):
        _overflow(trainer, step in BAD_STEPS and rank == bad_rank)
        result = trainer.step(*inputs_of(stream.next(rows), trainer.mesh.device))
        outcome, optimizer = result.outcome, trainer.optimizer
        seen.append(
            After(
                outcome.skipped,
                trainer.scaler.scale,
                optimizer.updates,
                outcome.learning_rate,
                list(state_of(trainer)),
            )
        )
    return seen, list(weights_of(trainer))


def _overflow(trainer: Trainer, happens: bool) -> None:
    """The next backward leaves an infinite gradient in one element of one of this rank's experts, if it
    `happens`."""
    pipeline = trainer.replica.pipeline
    run = type(pipeline).run

    def overflowing(*args: Any) -> Tensor:
        loss = run(pipeline, *args)
        (held,) = (one for one in trainer.replica.held if one.name == EXPERT)
        assert held.tensor.grad is not None
        grad = held.tensor.grad
        (grad.to_local() if isinstance(grad, DTensor) else grad)[0, 0, 0] = torch.inf
        return loss

    pipeline.run = overflowing if happens else run.__get__(pipeline)  # type: ignore[method-assign]


def state_of(trainer: Trainer) -> Any:
    """Weights, masters, moments and torch's count of steps, copied."""
    for held in trainer.replica.held:
        tensor = held.tensor.detach()
        yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
    for share in trainer.replica.store.shares:
        yield share.master.detach().clone()
        for value in trainer.optimizer.inner.state[share.master].values():
            yield value.clone()
    for _, layer in trainer.moe_layers():
        if layer.router.correction_bias is not None:
            yield layer.router.correction_bias.clone()


@pytest.mark.parametrize(
    ("case", "optimizer"), [*((case, "adamw") for case in LAYOUTS), (LAYOUTS[1], "sgd")], ids=str
)
def test_every_rank_skips_the_same_steps_and_keeps_all(case: Case, optimizer: str, corpus: Path) -> None:
    plan = case.plan(optimizer, **WARM)
    found = run_ranks(case.world, train, plan, corpus, case.world - 1)
    for seen, _ in found:
        assert [step for step, after in enumerate(seen) if after.skipped] == list(BAD_STEPS)
        assert [after.scale for after in seen] == EXPECTED_SCALES
        for step in range(1, STEPS):
            before, after = seen[step - 1], seen[step]
            same = [torch.equal(one, other) for one, other in zip(before.state, after.state, strict=True)]
            if step in BAD_STEPS:
                assert all(same)
                assert after.updates == before.updates
            else:
                assert not all(same)
                assert after.updates == before.updates + 1
        assert [after.learning_rate for after in seen][2:5] == [
            seen[2].learning_rate
        ] * 3  # nothing has moved


@pytest.mark.parametrize("case", [LAYOUTS[1], LAYOUTS[-1]], ids=str)
def test_training_goes_on_as_one_process_would(case: Case, corpus: Path) -> None:
    """With the same steps skipped there, weights are the same at the end, to within rounding."""
    found = run_ranks(case.world, train, case.plan("sgd", **WARM), corpus, case.world - 1)
    ((_, alone),) = run_ranks(1, train, case.alone("sgd", **WARM), corpus, 0)
    whole = {piece.name: piece.values.view([b - a for a, b in piece.region[1]]) for piece in alone}
    limit = limits(case, "sgd")["weight"]
    for _, pieces in found:
        for piece in pieces:
            size = whole[piece.name].double().norm().item()
            assert piece.square_of_difference(whole[piece.name]) ** 0.5 <= limit * size, piece.name


def test_an_overflow_in_forward_is_one_too(corpus: Path) -> None:
    """A scale far beyond what FP16 holds: steps are skipped until gradients are finite again."""
    case = LAYOUTS[1]
    scales = {"initial": 2.0**40, "window": 1000, "hysteresis": 1, "minimum": 1.0}
    plan = case.plan("sgd", loss_scale=scales)

    def start(rank: int) -> list[tuple[bool, float]]:
        trainer = trainer_of(plan, rank)
        stream, rows = stream_of(plan, corpus), rows_of_rank(plan, trainer.mesh)
        result = []
        for _ in range(40):
            outcome = trainer.step(*inputs_of(stream.next(rows), trainer.mesh.device)).outcome
            result.append((outcome.skipped, trainer.scaler.scale))
            if not outcome.skipped:
                break
        return result

    first, *others = run_ranks(case.world, start)
    assert all(other == first for other in others)
    assert len(first) > 2
    assert first[-1][0] is False
    assert [scale for _, scale in first[:-1]] == [2.0 ** (39 - step) for step in range(len(first) - 1)]
