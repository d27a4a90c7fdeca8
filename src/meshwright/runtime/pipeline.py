"""Running the micro-batches of a step: one after another on a single stage, or in a pipeline's order.

Pipelines are torch's own (`torch.distributed.pipelining`). Stages get static metadata, so that nothing is
run to find shapes out; one schedule is kept for each sequence length. The loss is scaled inside the last
stage, and gradients are not scaled again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules

from meshwright.plan import Plan
from meshwright.policy import ScheduleName
from meshwright.runtime.mesh import Mesh

COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of weights and activations, by the workload's precision."""

SCHEDULE_CLASSES: Mapping[ScheduleName, Any] = {
    "GPipe": schedules.ScheduleGPipe,
    "1F1B": schedules.Schedule1F1B,
    "Interleaved1F1B": schedules.ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": schedules.ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": schedules.ScheduleZBVZeroBubble,
    "DualPipeV": schedules.ScheduleDualPipeV,
}

Schedule = schedules.PipelineScheduleSingle | schedules.PipelineScheduleMulti


class Pipeline:
    """The stages of a rank, and how a step runs through them."""

    def __init__(self, plan: Plan, mesh: Mesh, stages: Mapping[int, nn.Module]) -> None:
        """`stages`: this rank's modules by stage number."""
        self.plan, self.mesh, self.stages = plan, mesh, dict(stages)
        self.schedules: dict[int, Schedule] = {}
        self.is_first = 0 in self.stages
        self.is_last = plan.layout.num_stages - 1 in self.stages

    def run(self, tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """Forward and backward of this rank's sequences [B, S]; gradients add up in the parameters.

        `extra`: more [B, S] tensors that every stage takes by name. Returns the sum of the micro-batches'
        scaled losses on the ranks of the last stage, 0 elsewhere.
        """
        if self.plan.layout.num_stages == 1:
            return self._alone(tokens, targets, extra)
        schedule = self._schedule(tokens.shape[1])
        losses: list[Tensor] = []
        inputs: dict[str, Any] = {"targets": targets, **extra}
        schedule.step(
            *((tokens,) if self.is_first else ()),
            target=targets if self.is_last else None,
            losses=losses if self.is_last else None,
            return_outputs=False,
            **inputs,
        )
        return _total(losses, self.mesh.device)

    def _alone(self, tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        (stage,) = self.stages.values()
        size = self.plan.policy.micro_batch_size
        losses = []
        for first in range(0, tokens.shape[0], size):
            rows = slice(first, first + size)
            if isinstance(stage, FSDPModule):  # one reduction a step, with the last micro-batch
                stage.set_requires_gradient_sync(first + size >= tokens.shape[0])
            more = {name: value[rows] for name, value in extra.items()}
            loss = stage(tokens[rows], targets=targets[rows], **more)
            loss.backward()
            losses.append(loss.detach())
        return _total(losses, self.mesh.device)

    def _schedule(self, length: int) -> Schedule:
        if length not in self.schedules:
            self.schedules[length] = self._build(length)
        return self.schedules[length]

    def _build(self, length: int) -> Schedule:
        plan = self.plan
        made = [self._stage(index, module, length) for index, module in self.stages.items()]
        kind = SCHEDULE_CLASSES[plan.policy.schedule]
        what = made if issubclass(kind, schedules.PipelineScheduleMulti) else made[0]
        return kind(what, plan.num_micro_batches, loss_fn=_as_it_is, scale_grads=False)

    def _stage(self, index: int, module: nn.Module, length: int) -> PipelineStage:
        last = self.plan.layout.num_stages - 1
        batch = self.plan.policy.micro_batch_size
        tokens = torch.empty(batch, length, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        return PipelineStage(
            module,
            index,
            last + 1,
            self.mesh.device,
            input_args=(tokens if index == 0 else self._stream(length),),
            output_args=(loss if index == last else self._stream(length),),
            group=self.mesh.group("pp"),
        )

    def _stream(self, length: int) -> Tensor:
        """The residual stream between two stages."""
        plan = self.plan
        divided = plan.layout.tp if plan.policy.sequence_parallel else 1
        shape = (length // divided, plan.policy.micro_batch_size, plan.model.hidden_size)
        kind = COMPUTE_TYPES[plan.workload.precision]
        return torch.empty(shape, dtype=kind, device="meta", requires_grad=True)


def _as_it_is(loss: Tensor, target: Tensor) -> Tensor:
    """The last stage's output is the loss already."""
    return loss


def _total(losses: Sequence[Tensor], device: torch.device) -> Tensor:
    if not losses:
        return torch.zeros((), device=device)
    return torch.stack([loss.detach() for loss in losses]).sum()
