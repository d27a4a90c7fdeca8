"""One training step of one rank: forward, backward, reduction, update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from meshwright.deployment import Training
from meshwright.plan import Plan
from meshwright.runtime.build import Replica, Values, build
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.layers import IGNORED
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.optim import Optimizer, Outcome, Scaler


@dataclass(frozen=True)
class StepResult:
    """What a rank knows after a step. `loss` is the rank's part of the mean over all targets: parts add up
    over the data ranks of the last stage; it is 0 on other stages."""

    loss: Tensor
    outcome: Outcome


class Trainer:
    """A plan on one rank, ready to train."""

    def __init__(
        self, plan: Plan, mesh: Mesh, values: Values | None = None, routes_evenly: bool = False
    ) -> None:
        self.plan, self.mesh = plan, mesh
        self.replica: Replica = build(plan, mesh, values, routes_evenly)
        training = plan.training or Training()
        self.scaler = Scaler(training.loss_scale, plan.workload.precision == "fp16")
        divided = plan.policy.zero_stage > 0
        name = plan.workload.optimizer
        self.optimizer = Optimizer(self.replica.store, mesh, training, name, self.scaler, divided)

    def gradients(self, tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Forward and backward of this rank's sequences of a global batch, [B, S]; gradients are not reduced
        yet. Returns the rank's part of the loss."""
        self.replica.store.clear_gradients()
        self._set_scales(targets)
        loss = self.replica.pipeline.run(tokens, targets, extra)
        return loss * self.replica.setting.scales.inverse

    def step(self, tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor] | None = None) -> StepResult:
        """One step on this rank's sequences of a global batch, [B, S]."""
        loss = self.gradients(tokens, targets, extra or {})
        return StepResult(loss, self.optimizer.step())

    def _set_scales(self, targets: Tensor) -> None:
        """What each loss is worth: means over the whole batch, whatever the layout."""
        scales, plan = self.replica.setting.scales, self.plan
        count = all_reduce((targets != IGNORED).sum().reshape(1), self.mesh.group("dp_cp"))
        scale = self.scaler.scale
        scales.token = scale / max(1, int(count.item()))
        scales.sequence = scale / plan.workload.global_batch_size
        scales.micro_batch = scale / (plan.num_micro_batches * plan.layout.dp)
        scales.inverse = 1.0 / scale


def rows_of_rank(plan: Plan, mesh: Mesh) -> range:
    """Which sequences of a global batch a rank works on."""
    count = plan.sequences_per_replica
    first = mesh.layout.coordinates(mesh.rank)["dp"] * count
    return range(first, first + count)
