"""A run that is saved on one layout and resumed on another goes on as if nothing had happened."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from meshwright.deployment import deployment_from
from meshwright.errors import InputError
from meshwright.plan import Plan, resolve
from meshwright.runtime import state
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.data import DataStream, open_stream
from meshwright.runtime.mesh import Mesh, build_mesh, single_process
from meshwright.runtime.step import Trainer, inputs_of, rows_of_rank
from meshwright.verify import require_valid

STEPS_BEFORE, STEPS_AFTER = 3, 10
LOSS_TOLERANCE = 1e-6

MODEL: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 257,  # padded under tp
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "intermediate_size": 32,
    "router": {"type": "sigmoid", "correction_bias": True},
}
SAVED: dict[str, Any] = {
    "layout": {"tp": 2, "pp": 2, "dp": 2, "ep": 4},
    "policy": {"schedule": "1F1B", "zero_stage": 1},
}
RESUMED: dict[str, dict[str, Any]] = {
    "one rank": {"layout": {}, "policy": {"zero_stage": 0}},
    "dp 2, ep 2, ZeRO 3": {"layout": {"dp": 2, "ep": 2}, "policy": {"zero_stage": 3}},
    "tp 2, ep 1, etp 2": {"layout": {"tp": 2, "etp": 2}, "policy": {"zero_stage": 0}},
    "pp 2, dp 2, ZBV": {
        "layout": {"pp": 2, "dp": 2, "vpp": 2, "ep": 2},
        "policy": {"schedule": "ZBVZeroBubble", "zero_stage": 2},
    },
    "dp 4, ep 2, etp 2, ZeRO 1": {"layout": {"dp": 4, "ep": 2, "etp": 2}, "policy": {"zero_stage": 1}},
    "dp 8, ep 4, ZeRO 3": {"layout": {"dp": 8, "ep": 4}, "policy": {"zero_stage": 3}},
    "tp 2, pp 4": {"layout": {"tp": 2, "pp": 4, "ep": 2}, "policy": {"schedule": "GPipe", "zero_stage": 0}},
}


def plan_of(layout: dict[str, int], policy: dict[str, Any], **model: Any) -> Plan:
    world = prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))
    document = {
        "cluster": {"local": world},
        "model": {**MODEL, **model},
        "workload": {"global_batch_size": 8, "sequence_length": 32, "precision": "fp32"},
        "layout": {"tp": 1, "pp": 1, "dp": 1, "ep": 1, **layout},
        "policy": {"engine": "native", **policy},
        "training": {"learning_rate": 0.01, "warmup_steps": 2, "steps": 20},
    }
    plan = resolve(deployment_from(document, Path()))
    require_valid(plan)
    return plan


def stream_of(plan: Plan, folder: Path) -> DataStream:
    assert plan.training is not None
    return open_stream(plan.training, plan.workload, plan.model.vocab_size, folder, folder / "cache")


def mesh_of(plan: Plan, rank: int) -> Mesh:
    device = torch.device("cpu")
    if plan.layout.world_size == 1:
        return single_process(device)
    return build_mesh(plan.layout, rank, device, plan.model.kv_heads)


def trained(trainer: Trainer, stream: DataStream, steps: int) -> list[float]:
    """The losses of some steps, whole on every rank."""
    losses = []
    for _ in range(steps):
        batch = stream.next(rows_of_rank(trainer.plan, trainer.mesh))
        loss = trainer.step(*inputs_of(batch, trainer.mesh.device)).loss.double().reshape(1)
        mine = loss if trainer.mesh.position("tp") == 0 else torch.zeros_like(loss)
        losses.append(all_reduce(mine, trainer.mesh.group("world")).item())
    return losses


def held_parts(trainer: Trainer) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """Everything that a checkpoint would hold of this rank: name, offsets, values."""
    return [
        (name, piece.offsets, piece.tensor.clone())
        for name, pieces in state.tensors(trainer).items()
        for piece in pieces.filled
    ]


def save_and_go_on(rank: int, plan: Plan, folder: Path) -> dict[str, Any]:
    trainer, stream = Trainer(plan, mesh_of(plan, rank)), stream_of(plan, folder)
    trained(trainer, stream, STEPS_BEFORE)
    state.save(trainer, stream, folder / "checkpoints")
    parts, shapes = held_parts(trainer), {n: p.shape for n, p in state.tensors(trainer).items()}
    return {"parts": parts, "shapes": shapes, "losses": trained(trainer, stream, STEPS_AFTER)}


def resume_and_go_on(rank: int, plan: Plan, folder: Path) -> dict[str, Any]:
    trainer, stream = Trainer(plan, mesh_of(plan, rank)), stream_of(plan, folder)
    state.restore(trainer, stream, folder / "checkpoints" / f"step-{STEPS_BEFORE:08}")
    parts, updates = held_parts(trainer), trainer.optimizer.updates
    return {"parts": parts, "updates": updates, "losses": trained(trainer, stream, STEPS_AFTER)}


def on_ranks(plan: Plan, run: Any, folder: Path) -> list[dict[str, Any]]:
    if plan.layout.world_size == 1:
        return [run(0, plan, folder)]
    return run_ranks(plan.layout.world_size, run, plan, folder)


def whole_tensors(ranks: list[dict[str, Any]]) -> dict[str, Tensor]:
    shapes = {name: shape for rank in ranks for name, shape in rank["shapes"].items()}
    whole = {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}
    for rank in ranks:
        for name, offsets, values in rank["parts"]:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            whole[name][region] = values
    return whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], list[float]]:
    """A run of eight ranks, saved after some steps and gone on with."""
    folder = tmp_path_factory.mktemp("run")
    ranks = on_ranks(plan_of(**SAVED), save_and_go_on, folder)
    return folder, whole_tensors(ranks), ranks[0]["losses"]


def test_a_checkpoint_holds_weights_both_moments_and_the_routers_biases(saved: Any) -> None:
    _, whole, _ = saved
    kinds = {name.split(".")[0] for name in whole}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq", "biases"}
    assert all(bool(tensor.isfinite().all()) for tensor in whole.values())
    assert any(bool(tensor.any()) for name, tensor in whole.items() if name.startswith("biases"))


@pytest.mark.parametrize("name", RESUMED)
def test_any_layout_resumes_bit_for_bit_and_trains_on_alike(name: str, saved: Any) -> None:
    folder, whole, losses = saved
    seen: set[str] = set()
    ranks = on_ranks(plan_of(**RESUMED[name]), resume_and_go_on, folder)
    for rank in ranks:
        assert rank["updates"] == STEPS_BEFORE
        for tensor, offsets, values in rank["parts"]:
            region = tuple(slice(o, o + n) for o, n in zip(offsets, values.shape, strict=True))
            assert torch.equal(whole[tensor][region], values), f"{tensor} at {offsets}"
            seen.add(tensor)
    assert seen == set(whole)
    for step, (here, there) in enumerate(zip(ranks[0]["losses"], losses, strict=True)):
        assert abs(here - there) <= LOSS_TOLERANCE * abs(there), f"step {step} after resuming"


def test_another_model_is_refused_before_anything_is_read(saved: Any) -> None:
    folder, _, _ = saved
    plan = plan_of({}, {"zero_stage": 0}, hidden_size=64)
    with pytest.raises(InputError, match=r"model\.hidden_size: 64: not as in the checkpoint's run"):
        resume_and_go_on(0, plan, folder)


def test_other_data_are_refused(saved: Any) -> None:
    folder, _, _ = saved
    plan = plan_of({}, {"zero_stage": 0})
    assert plan.training is not None
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"seed": 1})})
    with pytest.raises(InputError, match=r"training\.seed"):
        resume_and_go_on(0, plan, folder)
