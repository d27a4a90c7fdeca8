"""Multi-head and grouped-query attention over a rank's share of the heads.

Shape letters: S tokens of the whole sequence, B sequences, H hidden, N query heads and K key-value heads of
this rank, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.ir.sharding import local_dim
from meshwright.model import Model
from meshwright.runtime.layers import DividedNorm, Linear, RowLinear, rms_norm
from meshwright.runtime.region import Setting
from meshwright.runtime.selective import remade


@dataclass(frozen=True)
class Tokens:
    """What attention and routing know of a micro-batch's tokens, the same for every layer.

    `positions_SB`: place of a token in its document. `documents_BS`: which document of the sequence it
    belongs to, −1 for padding; None where each sequence is one document.
    """

    positions_SB: Tensor
    documents_BS: Tensor | None = None
    _masks: dict[int, Tensor] = field(default_factory=dict, init=False)
    _rotations: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    @cached_property
    def has_padding(self) -> bool:
        """Whether any token is padding."""
        return self.documents_BS is not None and bool((self.documents_BS < 0).any())

    def rotation(self, model: Model) -> tuple[Tensor, Tensor]:
        """Cosines and sines of these positions, made once: every layer keeps them for its backward."""
        key = rotated_width(model), model.rope_theta
        if key not in self._rotations:
            alike = self.positions_SB.stride(1) == 0  # every sequence has the same positions
            places = self.positions_SB[:, :1] if alike else self.positions_SB
            self._rotations[key] = rotation(model, places)
        return self._rotations[key]

    def mask(self, window: int | None) -> Tensor | None:
        """[B, 1, S, S], true where a query sees a key; None where plain causality says it all.

        A query sees keys of its own document, not after it, and at most `window` tokens back, itself
        included. Padding sees itself alone, so that no row is empty. Layers of one window share a mask.
        """
        length = self.positions_SB.shape[0]
        back = length if window is None else min(window, length)
        if self.documents_BS is None and back == length:
            return None
        if back not in self._masks:
            self._masks[back] = self._made_mask(length, back)
        return self._masks[back]

    def _made_mask(self, length: int, back: int) -> Tensor:
        place = torch.arange(length, device=self.positions_SB.device)
        behind = place.unsqueeze(1) - place.unsqueeze(0)
        seen = (behind >= 0) & (behind < back)
        if self.documents_BS is None:
            return seen.view(1, 1, length, length)
        same = self.documents_BS.unsqueeze(2) == self.documents_BS.unsqueeze(1)
        padding = (self.documents_BS < 0).unsqueeze(2) & (behind != 0)
        return (seen & same & ~padding).unsqueeze(1)


class Attention(nn.Module):
    """q, k, v column-parallel over heads, o row-parallel."""

    def __init__(self, setting: Setting, layer: int) -> None:
        super().__init__()
        model, tp = setting.model, setting.mesh.size("tp")
        heads, kv_heads, self.width = model.num_attention_heads, model.kv_heads, model.qk_head_dim
        self.setting, self.window = setting, model.window_of(layer)
        self.heads = local_dim(heads, tp, heads)
        self.kv_heads = local_dim(kv_heads, tp, kv_heads)
        hidden, bias = model.hidden_size, model.attention_bias
        self.q = Linear(hidden, self.heads * self.width, bias)
        self.k = Linear(hidden, self.kv_heads * self.width, bias)
        self.v = Linear(hidden, self.kv_heads * self.width, bias)
        self.o = RowLinear(setting, self.heads * self.width, hidden, model.attention_output_bias)
        self.q_norm = _qk_norm(setting, self.heads * self.width)
        self.k_norm = _qk_norm(setting, self.kv_heads * self.width)
        self.sinks = nn.Parameter(torch.empty(self.heads)) if model.attention_sinks else None

    def forward(self, x_SBH: Tensor, tokens: Tokens) -> Tensor:
        """Normed [S, B, H] shares in, [S, B, H] shares out."""
        x_SBH = self.setting.enter(x_SBH)
        q, k, v = self.q(x_SBH), self.k(x_SBH), self.v(x_SBH)
        q_SBND = self._heads(q, self.q_norm, self.heads)
        k_SBKD = self._heads(k, self.k_norm, self.kv_heads)
        v_SBKD = v.unflatten(-1, (self.kv_heads, self.width))
        if self.setting.model.position == "rope":
            cos, sin = tokens.rotation(self.setting.model)
            q_SBND, k_SBKD = rotate(q_SBND, cos, sin), rotate(k_SBKD, cos, sin)
        out_SBND = self._attend(q_SBND, k_SBKD, v_SBKD, tokens)
        return self.o(out_SBND.flatten(-2))

    def _heads(self, x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
        if isinstance(norm, DividedNorm):
            return norm(x).unflatten(-1, (heads, self.width))
        x = x.unflatten(-1, (heads, self.width))
        return x if norm is None else norm(x)

    def _attend(self, q_SBND: Tensor, k_SBKD: Tensor, v_SBKD: Tensor, tokens: Tokens) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBKD, v_SBKD))
        mask = tokens.mask(self.window)
        if self.sinks is not None:
            return _attend_with_sinks(q, k, v, mask, self.sinks).permute(2, 0, 1, 3)
        grouped = self.heads != self.kv_heads
        if grouped and mask is not None and q.device.type == "cuda":
            # CUDA's kernels take a mask or grouped heads, not both: else scores would stand in memory
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
            grouped = False
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3)


class HeadNorm(nn.Module):
    """RMSNorm over each head, with weights that all heads share."""

    def __init__(self, model: Model, remakes: bool) -> None:
        super().__init__()
        self.eps, self.remakes = model.norm_eps, remakes
        self.weight = nn.Parameter(torch.empty(model.qk_head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads, D]."""
        return remade(self._normed, x, self.weight) if self.remakes else self._normed(x, self.weight)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps)


def _qk_norm(setting: Setting, width: int) -> nn.Module | None:
    match setting.model.qk_norm:
        case "none":
            return None
        case "head":
            return HeadNorm(setting.model, setting.policy.recompute == "selective")
        case "full":
            return DividedNorm(setting, width)


def rotated_width(model: Model) -> int:
    """How many dims of a head turn with the position."""
    return int(model.qk_head_dim * model.partial_rotary_factor)


def rotation(model: Model, positions_SB: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, B, 1, R/2] of rotary positions over R = factor·D dims, in FP32.

    Angle i of position p: p·theta^(−2i/R) (Su et al., arXiv:2104.09864 §3.2.2).
    """
    width = rotated_width(model)
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=positions_SB.device)
    angles = positions_SB.float().unsqueeze(-1) * (1.0 / model.rope_theta ** (steps / width))
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the last dim, as Hugging Face's models do; dims past R stay."""
    return _Rotated.apply(x, cos, sin)


class _Rotated(torch.autograd.Function):
    """Backward turns the gradient the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.float()
    out = torch.empty_like(wide)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    out[..., 2 * half :] = wide[..., 2 * half :]
    return out.to(x.dtype)


def _attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks_N: Tensor) -> Tensor:
    """Attention in which each head may also look at nothing, by a learned logit (gpt-oss)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    length = q.shape[-2]
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    sink = sinks_N.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    shares = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    return shares.to(v.dtype) @ v
