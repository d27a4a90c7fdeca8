"""Recompute changes what is kept and nothing else: equal bits, less memory, no decision made twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from layouts import Case, _case
from ranks import run_ranks
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import Seen, mesh_of, steps_of, stream_of, trainer_of

from meshwright.plan import Plan
from meshwright.policy import Recompute
from meshwright.runtime import moe
from meshwright.runtime.model import Layer
from meshwright.runtime.step import Trainer, inputs_of, rows_of_rank

LEVELS: tuple[Recompute, ...] = ("none", "selective", "full")
STEPS = 3
LAYOUTS = (
    _case("gated", "", "z0", "mb2"),
    _case("balanced", "", "z0", "mb2"),
    _case("plain", "", "z0", "mb2"),
    _case("gated", "pp2 dp2 ep2", "z1", "1F1B"),
    _case("balanced", "pp2 dp2 ep2 vpp2", "z1", "ZBVZeroBubble"),
    _case("sigmoid", "tp2 pp2 vpp2", "z1", "mb2", "DualPipeV"),
)


def plan_of(case: Case, level: Recompute) -> Plan:
    return replace(case, policy={**case.policy, "recompute": level}).plan("adamw")


def train(rank: int, plan: Plan, folder: Path) -> tuple[list[Seen], dict[str, Tensor]]:
    trainer = trainer_of(plan, rank)
    seen = list(steps_of(trainer, stream_of(plan, folder), STEPS))
    return seen, {held.name: held.tensor.detach().clone() for held in trainer.replica.held}


# equal bits


@pytest.mark.parametrize("level", LEVELS[1:])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_recompute_changes_no_bit(case: Case, level: Recompute, corpus: Path) -> None:
    plain, again = (run_ranks(case.world, train, plan_of(case, one), corpus) for one in ("none", level))
    for (steps, weights), (other_steps, other_weights) in zip(plain, again, strict=True):
        for one, other in zip(steps, other_steps, strict=True):
            assert (one.loss, one.norm, one.balance) == (other.loss, other.norm, other.balance)
            assert all(torch.equal(one.chosen[layer], other.chosen[layer]) for layer in one.chosen)
            for piece, same in zip(one.gradients, other.gradients, strict=True):
                assert torch.equal(piece.values, same.values), piece.name
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


# memory


class Alive(TorchDispatchMode):
    """Knows every storage that is made while it is active, and which of them still live. Views of what was
    there before make none."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.before = {tensor.untyped_storage()._cdata for tensor in before}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, tuple | list) else (result,):
            if isinstance(out, Tensor):
                storage = out.untyped_storage()
                if storage._cdata not in self.before:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def num_bytes(self) -> int:
        """Bytes of those that live."""
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def kept_bytes(rank: int, plan: Plan, folder: Path) -> int:
    """Bytes that one micro-batch keeps between forward and backward."""
    trainer = trainer_of(plan, rank)
    (stage,) = trainer.replica.stages.values()
    tokens, targets, extra = inputs_of(stream_of(plan, folder).next(range(2)), mesh_of(plan, rank).device)
    with Alive(stage.parameters()) as alive:
        loss = stage(tokens, targets=targets, **extra)
        kept = alive.num_bytes()
    loss.backward()
    return kept


@pytest.mark.parametrize("model", ["gated", "plain", "sigmoid"])
def test_recompute_keeps_less(model: str, corpus: Path) -> None:
    case = _case(model, "", "z0", "mb2")
    none, selective, full = (run_ranks(1, kept_bytes, plan_of(case, level), corpus)[0] for level in LEVELS)
    assert selective < 0.9 * none
    assert full < 0.3 * selective  # the head keeps its logits at any level


def test_full_recompute_keeps_the_input_of_each_layer_and_little_else(corpus: Path) -> None:
    """From 4 layers to 8, what is kept grows by four inputs and the routing's decisions."""
    case = _case("uneven", "", "z0", "mb2")
    sizes = []
    for layers in (4, 8):
        plan = plan_of(case, "full")
        model = plan.model.model_copy(update={"num_hidden_layers": layers})
        policy = plan.policy.model_copy(update={"layers_per_stage": (layers,)})
        longer = plan.model_copy(update={"model": model, "policy": policy})
        sizes.append(run_ranks(1, kept_bytes, longer, corpus)[0])
    tokens = 2 * plan.workload.max_sequence_length
    stream = 4 * tokens * plan.model.hidden_size
    decisions = 8 * tokens * plan.model.num_experts_per_tok
    assert 4 * stream <= sizes[1] - sizes[0] <= 4 * (stream + decisions) + 4096


# decisions


def never_the_same(calls: Counter[str]) -> Callable[..., Any]:
    """`route`, but for choices that another call would not make again."""
    route = moe.route

    def changed(logits: Tensor, router: Any, top_k: int, *, decision: Any = None, **rest: Any) -> Any:
        if decision is not None:
            calls["replayed"] += 1
            return route(logits, router, top_k, decision=decision, **rest)
        calls["decided"] += 1
        with torch.no_grad():
            decision = route(logits, router, top_k, **rest).decision
        turned = (decision.choices + calls["decided"]) % logits.shape[1]
        return route(logits, router, top_k, decision=replace(decision, choices=turned), **rest)

    return changed


def train_with_fickle_router(rank: int, plan: Plan, folder: Path) -> tuple[list[float], Counter[str]]:
    calls: Counter[str] = Counter()
    moe.route = never_the_same(calls)
    seen, _ = train(rank, plan, folder)
    return [step.norm for step in seen], calls


@pytest.mark.parametrize("degrees", ["", "pp2 dp2 ep2"])
def test_full_recompute_decides_nothing_anew(degrees: str, corpus: Path) -> None:
    case = _case("uneven", degrees, "z1", "mb2")
    results = {
        level: run_ranks(case.world, train_with_fickle_router, plan_of(case, level), corpus)
        for level in ("none", "full")
    }
    for (norms, calls), (other_norms, other_calls) in zip(results["none"], results["full"], strict=True):
        assert norms == other_norms
        assert other_calls == {"decided": calls["decided"], "replayed": calls["decided"]}


def test_a_router_that_is_asked_again_would_be_seen(corpus: Path) -> None:
    """Without the tape, that router's second choice differs: the check above is not empty."""
    case = _case("uneven", "", "z1", "mb2")

    def forgetful(rank: int, plan: Plan, folder: Path) -> list[float]:
        moe.current_tape = lambda: None
        return train_with_fickle_router(rank, plan, folder)[0]

    (right, _), *_ = run_ranks(1, train_with_fickle_router, plan_of(case, "none"), corpus)
    assert run_ranks(1, forgetful, plan_of(case, "full"), corpus)[0] != right


# how often


def runs_of_layers(rank: int, plan: Plan, folder: Path) -> Counter[str]:
    """How often each layer ran in a step, without gradients and with."""
    runs: Counter[str] = Counter()
    trainer: Trainer = trainer_of(plan, rank)
    names = {layer: n for s in trainer.replica.stages.values() for n, layer in s.layers.items()}
    run = Layer._run

    def counted(self: Layer, *args: Any) -> Tensor:
        runs[names[self]] += 1
        return run(self, *args)

    Layer._run = counted  # type: ignore[method-assign]
    trainer.step(
        *inputs_of(stream_of(plan, folder).next(rows_of_rank(plan, trainer.mesh)), torch.device("cpu"))
    )
    return runs


@pytest.mark.parametrize(
    "case",
    [
        _case("gated", "", "z0", "mb2"),
        _case("gated", "pp2 dp2 ep2", "z1", "1F1B"),
        _case("gated", "pp2 dp2 ep2", "z3", "1F1B"),
        _case("gated", "pp2 vpp2", "z1", "mb2", "InterleavedZeroBubble"),
        _case("gated", "pp2 vpp2", "z1", "mb2", "ZBVZeroBubble"),
        _case("gated", "pp2 vpp2", "z1", "mb2", "DualPipeV"),
    ],
    ids=str,
)
def test_a_layer_runs_again_once_for_each_micro_batch(case: Case, corpus: Path) -> None:
    """Also where a schedule splits backward into input and weight gradients."""
    for level, times in (("none", 1), ("full", 2)):
        plan = plan_of(case, level)
        for runs in run_ranks(case.world, runs_of_layers, plan, corpus):
            assert set(runs.values()) == {times * plan.num_micro_batches}
