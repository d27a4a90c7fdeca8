"""One optimizer step over all ranks: norm, clipping, loss scale, update, all or nothing.

The optimizer is torch's, on flat FP32 shares. Squares of gradients add up over every axis that divides them,
dense and expert parameters apart until the end: their meshes differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.deployment import LossScale, Training
from meshwright.ir.sharding import zero_axes
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.shares import Share
from meshwright.runtime.store import Store
from meshwright.workload import Optimizer as OptimizerName


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did. `grad_norm` is the norm before clipping, without the loss scale."""

    grad_norm: float
    skipped: bool
    learning_rate: float


class Scaler:
    """Dynamic loss scale (Megatron-LM `optimizer/grad_scaler.py`): halves when `hysteresis` overflows came
    without `window` clean steps between them, doubles after `window` clean steps."""

    def __init__(self, settings: LossScale, enabled: bool) -> None:
        self.settings, self.enabled = settings, enabled
        self.scale = settings.initial if enabled else 1.0
        self.clean_steps = 0
        self.overflows_left = settings.hysteresis

    def update(self, overflow: bool) -> None:
        """Take a step's result into account."""
        if not self.enabled:
            return
        if overflow:
            if self.scale <= self.settings.minimum:
                raise FloatingPointError(f"gradients overflow even at the least loss scale, {self.scale:g}")
            self.clean_steps = 0
            self.overflows_left -= 1
            if self.overflows_left <= 0:
                self.scale = max(self.scale / 2, self.settings.minimum)
            return
        self.clean_steps += 1
        if self.clean_steps == self.settings.window:
            self.clean_steps = 0
            self.overflows_left = self.settings.hysteresis
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps. A scale of 0 stands for a run that had none."""
        if not self.enabled:
            return {"scale": 0.0, "clean_steps": 0, "overflows_left": 0}
        return {"scale": self.scale, "clean_steps": self.clean_steps, "overflows_left": self.overflows_left}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint; a run of another type has no scale to go on with."""
        if not self.enabled or not state["scale"]:
            return
        self.scale = float(state["scale"])
        self.clean_steps = int(state["clean_steps"])
        self.overflows_left = int(state["overflows_left"])


def learning_rate(training: Training, update: int) -> float:
    """The rate of an update, counted from 0: linear warm-up, then half a cosine; constant without warm-up."""
    top, low, warm = training.learning_rate, training.min_learning_rate, training.warmup_steps
    if warm == 0:
        return top
    if update < warm:
        return top * (update + 1) / warm
    done = min(1.0, (update - warm) / max(1, training.steps - warm))
    return low + (top - low) * 0.5 * (1 + math.cos(math.pi * done))


class Optimizer:
    """Steps a store's shares. `updates` counts the steps that were not skipped."""

    def __init__(
        self, store: Store, mesh: Mesh, training: Training, name: OptimizerName, scaler: Scaler, divided: bool
    ) -> None:
        self.store, self.mesh, self.training, self.name = store, mesh, training, name
        self.scaler, self.divided = scaler, divided
        self.updates = 0
        names = moment_names(name, training.momentum)
        self.moments = {
            id(share): {moment: torch.zeros_like(share.master) for moment in names} for share in store.shares
        }
        self.inner = self._inner()

    def _inner(self) -> torch.optim.Optimizer:
        shares, training = self.store.shares, self.training
        for share in shares:
            share.master.grad = share.gradient
        groups = [
            {"params": [s.master for s in shares if s.held.decays], "weight_decay": training.weight_decay},
            {"params": [s.master for s in shares if not s.held.decays], "weight_decay": 0.0},
        ]
        inner: torch.optim.Optimizer
        if self.name == "adamw":
            betas = (training.beta1, training.beta2)
            inner = torch.optim.AdamW(groups, betas=betas, eps=training.epsilon, fused=True)
        else:
            inner = torch.optim.SGD(groups, lr=1.0, momentum=training.momentum, fused=True)
        self._set_state(inner, 0)
        return inner

    def _set_state(self, inner: torch.optim.Optimizer, step: int) -> None:
        """Give torch's optimizer its moments before the first step, so that a checkpoint has a place."""
        for share in self.store.shares:
            state: dict[str, Tensor] = dict(self.moments[id(share)])
            if self.name == "adamw":
                state["step"] = torch.tensor(float(step), device=share.master.device)
            inner.state[share.master] = state

    def restore(self, updates: int) -> None:
        """Go on after so many updates; moments were filled in place."""
        self.updates = updates
        self._set_state(self.inner, updates)

    def step(self) -> Outcome:
        """Reduce gradients, then update on every rank, or on none where a gradient is not finite under fp16.

        Raises FloatingPointError on every rank when a gradient is not finite in another type.
        """
        self.store.reduce_gradients()
        rate = learning_rate(self.training, self.updates)
        scale = self.scaler.scale
        if self.scaler.enabled and self._overflowed():
            self.scaler.update(overflow=True)
            return Outcome(math.nan, True, rate)
        norm = self._norm() / scale
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm} after {self.updates} updates")
        self._scale_gradients(norm, scale)
        for group in self.inner.param_groups:
            group["lr"] = rate
        self.inner.step()
        self.store.publish()
        self.updates += 1
        self.scaler.update(overflow=False)
        return Outcome(norm, False, rate)

    def _scale_gradients(self, norm: float, scale: float) -> None:
        """Undo the loss scale, and clip: times max_norm / (norm + 1e-6), at most 1 (Megatron-LM
        `optimizer/clip_grads.py`)."""
        most = self.training.gradient_clip
        factor = min(1.0, most / (norm + 1e-6)) if most > 0 else 1.0
        if factor / scale != 1.0:
            torch._foreach_mul_([share.gradient for share in self.store.shares], factor / scale)

    def _overflowed(self) -> bool:
        """Whether any gradient of any rank is infinite or not a number."""
        sums = [share.gradient.sum() for share in self.store.shares]
        bad = torch.stack(sums).isfinite().logical_not().any() if sums else torch.tensor(False)
        flag = bad.to(torch.float32).reshape(1)
        return bool(all_reduce(flag, self.mesh.group("world"), dist.ReduceOp.MAX).item())

    def _norm(self) -> float:
        """L2 norm of the whole gradient: each element once, whoever else holds it."""
        shares = [share for share in self.store.shares if share.held.is_first]
        total = torch.zeros(1, dtype=torch.float32, device=self.mesh.device)
        dense, expert = zero_axes(self.mesh.layout)
        meshes: tuple[tuple[bool, tuple[str, ...]], ...] = ((False, ("tp", dense)),)
        if self.store.has_experts:  # every rank of a stage holds experts, or none does
            meshes += ((True, ("etp", "ep", expert)),)
        for experts, axes in meshes:
            squares = _squares([s for s in shares if s.held.param.is_expert is experts], self.mesh.device)
            for axis in axes:
                if self.divided or axis not in (dense, expert):
                    squares = all_reduce(squares, self.mesh.group(axis))
            total = total + squares
        return math.sqrt(all_reduce(total, self.mesh.group("pp")).item())


def _squares(shares: Sequence[Share], device: torch.device) -> Tensor:
    if not shares:
        return torch.zeros(1, dtype=torch.float32, device=device)
    norms = torch._foreach_norm([share.gradient for share in shares])
    return torch.stack(norms).square().sum().reshape(1)


def moment_names(name: OptimizerName, momentum: float) -> tuple[str, ...]:
    """What an optimizer keeps for each element, by torch's names."""
    if name == "adamw":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if momentum else ()
