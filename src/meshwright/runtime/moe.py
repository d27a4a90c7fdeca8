"""The expert layer: router, shared experts, routed experts.

Shape letters: S and B as everywhere, T = S·B tokens of this rank, K chosen experts of each, E experts,
L experts of this rank, F a rank's share of an expert's width, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model import Model
from meshwright.runtime.attention import Tokens
from meshwright.runtime.dispatch import dispatch
from meshwright.runtime.layers import FeedForward, Linear, product
from meshwright.runtime.permute import grouped_matmul
from meshwright.runtime.region import Setting


class Experts(nn.Module):
    """This rank's experts, each with its share of the width."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model, mesh = setting.model, setting.mesh
        local, hidden = model.num_experts // mesh.size("ep"), model.hidden_size
        share = (model.moe_intermediate_size or 0) // mesh.size("etp")
        self.setting, self.name = setting, model.hidden_act or "silu"
        self.gate = _weight(local, share, hidden) if model.gated else None
        self.up = _weight(local, share, hidden)
        self.down = _weight(local, hidden, share)
        biased = model.expert_bias
        self.gate_bias = _weight(local, share) if model.gated and biased else None
        self.up_bias = _weight(local, share) if biased else None
        self.down_bias = _weight(local, hidden) if biased else None

    def forward(self, rows: Tensor, counts_L: Tensor) -> Tensor:
        """[R, H] sorted by expert to [R, H], partial sums over etp."""
        gate = None if self.gate is None else _affine(rows, self.gate, self.gate_bias, counts_L)
        up = _affine(rows, self.up, self.up_bias, counts_L)
        inner = product(gate, up, self.name, self.setting)
        first = self.setting.mesh.position("etp") == 0  # partial sums add up: one rank adds the bias
        bias = self.down_bias if self.down_bias is None or first else self.down_bias * 0
        return _affine(inner, self.down, bias, counts_L)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, counts_L: Tensor) -> Tensor:
    y = grouped_matmul(x, weight, counts_L)
    return y if bias is None else y + bias.repeat_interleave(counts_L, 0)


class Router(nn.Module):
    """Logits of every expert for each token."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.bias = nn.Parameter(torch.empty(model.num_experts)) if model.router.bias else None

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, E], in FP32."""
        return F.linear(x_TH, self.weight, self.bias).float()


class MoE(nn.Module):
    """Router, shared experts, dispatch, routed experts, combine."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model, self.setting = setting.model, setting
        self.router = Router(model)
        self.experts = Experts(setting)
        width = model.shared_width
        self.shared = FeedForward(setting, width, bias=False) if width else None
        gated = bool(width) and model.shared_expert_gate
        self.shared_gate = Linear(model.hidden_size, 1) if gated else None

    def forward(self, x_SBH: Tensor, tokens: Tokens) -> Tensor:
        """Normed [S, B, H] shares in, [S, B, H] shares out."""
        x_TH = x_SBH.flatten(0, 1)
        scores = self.router(x_TH).softmax(-1)
        weights, choices = scores.topk(self.setting.model.num_experts_per_tok)
        weights = weights / weights.sum(-1, keepdim=True)
        shared = None if self.shared is None else self.shared(x_SBH)
        if shared is not None and self.shared_gate is not None:
            shared = shared * self.shared_gate(x_SBH).sigmoid()
        routed = dispatch(self.setting, x_TH, choices, weights, self.experts).view_as(x_SBH)
        return routed if shared is None else routed + shared
