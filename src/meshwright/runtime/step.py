"""One training step of one rank: forward, backward, reduction, update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.deployment import Training
from meshwright.plan import Plan
from meshwright.runtime.build import Replica, Values, build
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.data import IGNORED, Batch
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.moe import MoE
from meshwright.runtime.optim import Optimizer, Outcome, Scaler
from meshwright.runtime.routing import updated_bias


@dataclass(frozen=True)
class StepResult:
    """What a rank knows after a step. `loss` is the rank's part of the mean over all targets: parts add up
    over the data ranks of the last stage; it is 0 on other stages."""

    loss: Tensor
    outcome: Outcome


class Trainer:
    """A plan on one rank, ready to train. `steps` counts all steps, those that were skipped too."""

    def __init__(
        self, plan: Plan, mesh: Mesh, values: Values | None = None, routes_evenly: bool = False
    ) -> None:
        self.plan, self.mesh = plan, mesh
        self.training = plan.training or Training()
        self.replica: Replica = build(plan, mesh, values, routes_evenly)
        self.scaler = Scaler(self.training.loss_scale, plan.workload.precision == "fp16")
        divided = plan.policy.zero_stage > 0
        name = plan.workload.optimizer
        self.optimizer = Optimizer(self.replica.store, mesh, self.training, name, self.scaler, divided)
        self.steps = 0

    def step(self, tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor] | None = None) -> StepResult:
        """One step on this rank's sequences of a global batch, [B, S].

        On every rank the step is done whole or, after an overflow under fp16, not at all: weights,
        optimizer, learning rate and router biases stay, and only the loss scale changes.
        """
        loss = self.gradients(tokens, targets, extra or {})
        outcome = self.optimizer.step()
        if not outcome.skipped:
            self._move_biases()
        self.steps += 1
        return StepResult(loss, outcome)

    def gradients(self, tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Forward and backward of this rank's sequences of a global batch, [B, S]; gradients are not reduced
        yet. Returns the rank's part of the loss."""
        self.replica.store.clear_gradients()
        self._set_scales(targets)
        self._start_routing()
        loss = self.replica.pipeline.run(tokens, targets, extra)
        return loss * self.replica.setting.scales.inverse

    def moe_layers(self) -> Iterator[tuple[int, MoE]]:
        """The expert layers that this rank holds, by their number in the model."""
        for stage in self.replica.stages.values():
            for moe in stage.moe_layers():
                yield moe.layer, moe

    def _set_scales(self, targets: Tensor) -> None:
        """What each loss is worth: means over the whole batch, whatever the layout."""
        scales, plan = self.replica.setting.scales, self.plan
        count = all_reduce((targets != IGNORED).sum().reshape(1), self.mesh.group("dp_cp"))
        scale = self.scaler.scale
        scales.token = scale / max(1, int(count.item()))
        scales.sequence = scale / plan.workload.global_batch_size
        scales.micro_batch = scale / (plan.num_micro_batches * plan.layout.dp)
        scales.inverse = 1.0 / scale

    def _start_routing(self) -> None:
        """Forget what the last step routed, and give each layer's random choices a seed of this step."""
        for number, moe in self.moe_layers():
            moe.counts = moe.balance = None
            word = f"{self.training.seed} {self.steps} {number} {self.mesh.rank}"
            moe.generator.manual_seed(int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big"))

    def _move_biases(self) -> None:
        """Correction biases follow the load of the whole batch (DeepSeek-V3, arXiv:2412.19437 §2.1.2)."""
        layers = [moe for _, moe in self.moe_layers() if moe.router.correction_bias is not None]
        if not layers:
            return
        counts = torch.stack([moe.counts.offered for moe in layers if moe.counts is not None]).int()
        for axis in ("tp", "dp_cp"):
            counts = all_reduce(counts, self.mesh.group(axis))
        for moe, own in zip(layers, counts, strict=True):
            bias = moe.router.correction_bias
            assert bias is not None
            bias.copy_(updated_bias(bias, own, self.training.router_bias_rate))


def rows_of_rank(plan: Plan, mesh: Mesh) -> range:
    """Which sequences of a global batch a rank works on."""
    count = plan.sequences_per_replica
    first = mesh.layout.coordinates(mesh.rank)["dp"] * count
    return range(first, first + count)


def inputs_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, targets and what else the stages need of a rank's rows of a batch: positions and documents
    where a sequence is not one document from end to end."""
    extra = {}
    if bool((batch.documents != 0).any()):
        extra = {"positions": batch.positions.to(device), "documents": batch.documents.to(device)}
    return batch.tokens.to(device), batch.targets.to(device), extra
