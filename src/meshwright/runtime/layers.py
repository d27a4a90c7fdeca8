"""Modules that hold a rank's share of the parameters, under the names that the graph gives them.

Shape letters: S tokens of a sequence, B sequences of a micro-batch, H hidden, F a rank's share of a
feed-forward width. A module allocates what `ir/sharding.py` says its rank holds; values come later
(`initial.py`, a checkpoint or another model's weights).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model import Activation, Model
from meshwright.runtime.collectives import sum_both
from meshwright.runtime.region import Setting
from meshwright.runtime.selective import remade


class Linear(nn.Module):
    """x·Wᵀ + b with the rank's rows or columns of W; whoever uses it gathers and adds up."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return F.linear(x, self.weight, self.bias)


class RowLinear(Linear):
    """A row-parallel matmul: partial sums over tp leave the region, and the bias is added once, after."""

    def __init__(self, setting: Setting, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias)
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, inputs of this rank] to this rank's share of [S, B, outputs]."""
        y = self.setting.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim."""

    def __init__(self, model: Model, width: int, remakes: bool = False) -> None:
        super().__init__()
        self.eps, self.remakes = model.norm_eps, remakes
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if model.norm == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x; made again in backward where the module `remakes`."""
        inputs = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        return remade(self._normed, *inputs) if self.remakes else self._normed(*inputs)

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return rms_norm(x, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim, in FP32 (Zhang and Sennrich, arXiv:1910.07467).

    CUDA has a kernel for each way; elsewhere torch's own backward is made of twice as many passes as needed.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number for each row.

    With r = 1 / sqrt(mean(x²) + eps), n = x·r and the output's gradient g, the weight's gradient is Σ g·n
    over rows and the input's (g·weight − n·mean(g·weight·n))·r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = (norms.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (wide * r).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        n, grad = x.float() * r, grads[0].float()
        by_weight = grad * n
        sums = (by_weight @ weight.float()).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(n, sums, value=-1 / x.shape[-1]).mul_(r)
        return grad_x.to(x.dtype), by_weight.flatten(0, -2).sum(0), None


class DividedNorm(nn.Module):
    """RMSNorm over a width that tp divides: the ranks add up their squares."""

    def __init__(self, setting: Setting, width: int) -> None:
        super().__init__()
        self.eps, self.group = setting.model.norm_eps, setting.mesh.group("tp")
        self.total = width * setting.mesh.size("tp")
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width of this rank]; a width that several ranks hold counts as often on both sides."""
        wide = x.float()
        squares = sum_both(wide.square().sum(-1, keepdim=True), self.group)
        return (wide * torch.rsqrt(squares / self.total + self.eps)).to(x.dtype) * self.weight


def activate(x: Tensor, name: Activation) -> Tensor:
    """The activation that a model names."""
    match name:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)


class FeedForward(nn.Module):
    """A dense feed-forward network: gate and up column-parallel, down row-parallel."""

    def __init__(self, setting: Setting, width: int, bias: bool) -> None:
        super().__init__()
        model, share = setting.model, width // setting.mesh.size("tp")
        self.setting, self.name = setting, model.hidden_act or "silu"
        self.gate = Linear(model.hidden_size, share, bias) if model.gated else None
        self.up = Linear(model.hidden_size, share, bias)
        self.down = RowLinear(setting, share, model.hidden_size, bias)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """[S, B, H] shares in, [S, B, H] shares out."""
        x_SBH = self.setting.enter(x_SBH)
        gate = None if self.gate is None else self.gate(x_SBH)
        return self.down(product(gate, self.up(x_SBH), self.name, self.setting))


def product(gate: Tensor | None, up: Tensor, name: Activation, setting: Setting) -> Tensor:
    """act(gate)·up, or act(up); made again in backward under selective recompute."""

    def compute(*inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            return activate(inputs[0], name)
        return activate(inputs[0], name) * inputs[1]

    inputs = (up,) if gate is None else (gate, up)
    if setting.policy.recompute == "selective":
        return remade(compute, *inputs)
    return compute(*inputs)


class Embedding(nn.Module):
    """The rank's rows of the token table: rows of others count as zero, and the ranks' results add up."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model, tp = setting.model, setting.mesh.size("tp")
        self.setting = setting
        self.rows = -(-model.vocab_size // tp)
        self.first = setting.mesh.position("tp") * self.rows
        self.weight = nn.Parameter(torch.empty(self.rows, model.hidden_size))

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """Token numbers [S, B] of the whole sequence to this rank's share of [S, B, H]."""
        if self.setting.mesh.size("tp") == 1:
            return F.embedding(tokens_SB, self.weight)
        local = tokens_SB - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.setting.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class Positions(nn.Module):
    """Learned positions, whole on every rank of tp and looked up for its share of the tokens."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        model = setting.model
        self.setting = setting
        self.weight = nn.Parameter(torch.empty(model.max_position_embeddings or 0, model.hidden_size))

    def forward(self, x_SBH: Tensor, positions_SB: Tensor) -> Tensor:
        """Adds to the rank's share of the tokens."""
        return x_SBH + F.embedding(self.setting.own_tokens(positions_SB), self.weight)
