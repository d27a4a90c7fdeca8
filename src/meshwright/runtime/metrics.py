"""What is said of a step: one record that all ranks add up, with routing under fairseq's names.

These reductions are no part of the step itself; a run that reports less often makes them less often.
"""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.cluster import LOCAL_GPU
from meshwright.ir.program import model_flops
from meshwright.plan import Plan
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.data import Batch
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.routing import RoutingCounts, routing_log
from meshwright.runtime.step import StepResult, Trainer

FAIRSEQ_KEYS = (
    "overflow_expert1",
    "overflow_expert2",
    "entropy_gating",
    "expert1_balance_top",
    "expert1_balance_bottom",
    "expert2_balance_top",
    "expert2_balance_bottom",
    "unused_expert1_count",
    "unused_expert2_count",
)


@dataclass(frozen=True)
class Record:
    """One step as it is reported. `loss` is cross-entropy alone, the mean over all targets, in nats;
    `routing` has one figure for each expert layer under each key; `mfu` is None where no peak is known.
    Losses and entropies are not finite where a forward pass overflowed, and null in the document."""

    step: int
    loss: float
    aux_loss: float
    grad_norm: float | None
    lr: float
    loss_scale: float
    skipped: bool
    tokens: int
    tokens_per_s: float
    mfu: float | None
    step_time_s: float
    peak_memory_bytes: int
    expert_load_max_over_mean: float | None
    dropped_fraction: float
    routing: dict[str, list[float]]

    def document(self) -> dict[str, Any]:
        """The record as one JSON line holds it; of routing the means over layers stand at the top too."""
        fields = dict(vars(self))
        layers = fields.pop("routing")
        means = {key: sum(layers[key]) / len(layers[key]) for key in FAIRSEQ_KEYS if layers.get(key)}
        listed = {key: [_or_none(value) for value in values] for key, values in layers.items()}
        return {**{key: _or_none(value) for key, value in (fields | means).items()}, "layers": listed}


def _or_none(value: Any) -> Any:
    """What JSON can hold: an overflow in a forward pass leaves losses and entropies that are no numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record(trainer: Trainer, result: StepResult, batch: Batch, seconds: float, scale: float) -> Record:
    """The record of a step, the same on every rank. `scale` is the loss scale that the step ran with."""
    plan, mesh = trainer.plan, trainer.mesh
    sums = _added_up(trainer, result, batch)
    loss, aux_loss, tokens = (float(x) for x in sums[:3])
    layers = _layers(plan, sums[3:])
    outcome = result.outcome
    loads = layers.get("load_max_over_mean")
    return Record(
        step=trainer.steps,
        loss=loss,
        aux_loss=aux_loss,
        grad_norm=None if math.isnan(outcome.grad_norm) else outcome.grad_norm,
        lr=outcome.learning_rate,
        loss_scale=scale,
        skipped=outcome.skipped,
        tokens=int(tokens),
        tokens_per_s=tokens / seconds,
        mfu=_mfu(plan, mesh, batch.tokens.shape[1], seconds),
        step_time_s=seconds,
        peak_memory_bytes=_peak_memory(mesh),
        expert_load_max_over_mean=max(loads) if loads else None,
        dropped_fraction=_mean(layers.get("dropped_fraction", [])),
        routing=layers,
    )


def _added_up(trainer: Trainer, result: StepResult, batch: Batch) -> Tensor:
    """Loss, auxiliary loss, tokens, and every expert layer's counts, over all ranks: one all-reduce.

    Ranks of tp that hold the same figure give it once; so do the stages."""
    plan, mesh = trainer.plan, trainer.mesh
    first_tp = mesh.position("tp") == 0
    own = dict(trainer.moe_layers())
    balance = sum((moe.balance for moe in own.values() if moe.balance is not None), torch.zeros(()))
    counted = first_tp and mesh.position("pp") == 0
    parts = [
        result.loss.double().reshape(1).cpu() * first_tp,
        torch.as_tensor(balance).double().reshape(1).cpu() * first_tp,
        (batch.documents >= 0).sum().double().reshape(1) * counted,
    ]
    width = 3 * plan.model.num_experts + 6
    for layer in _moe_layers(plan):
        counts = own[layer].counts if layer in own else None
        parts.append(torch.zeros(width, dtype=torch.float64) if counts is None else counts.packed().cpu())
    return all_reduce(torch.cat(parts).to(mesh.device), mesh.group("world")).cpu()


def _moe_layers(plan: Plan) -> list[int]:
    return [layer for layer in range(plan.model.num_hidden_layers) if plan.model.is_moe_layer(layer)]


def _layers(plan: Plan, sums: Tensor) -> dict[str, list[float]]:
    layers = _moe_layers(plan)
    if not layers:
        return {}
    logged = routing_log(RoutingCounts.unpacked(sums.view(len(layers), -1)))
    return {key: value.tolist() for key, value in logged.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _mfu(plan: Plan, mesh: Mesh, length: int, seconds: float) -> float | None:
    """Model FLOPs of whole sequences over what all GPUs could do; unknown for the machine at hand, and
    where processors stand in for the plan's GPUs."""
    if plan.cluster.gpu.name == LOCAL_GPU or mesh.device.type != "cuda":
        return None
    peak = plan.cluster.gpu.peak[plan.workload.precision] * plan.cluster.num_gpus
    return model_flops(plan, length) / (seconds * peak)


def _peak_memory(mesh: Mesh) -> int:
    """The most that any rank held so far: what tensors took of a GPU, or a process of main memory."""
    if mesh.device.type == "cuda":
        most = torch.cuda.max_memory_allocated(mesh.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    value = torch.tensor([most], dtype=torch.int64, device=mesh.device)
    return int(all_reduce(value, mesh.group("world"), dist.ReduceOp.MAX).item())
