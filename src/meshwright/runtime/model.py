"""The transformer as plain modules: one pipeline stage on one rank, its parameters named as the graph's.

Shape letters: S tokens of a sequence, B sequences of a micro-batch, H hidden, V a rank's share of the
vocabulary. Tokens come batch-first, [B, S]; the residual stream is [S, B, H], divided along S over tp where
sequence parallelism is on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.runtime.again import run_again
from meshwright.runtime.attention import Attention, Tokens
from meshwright.runtime.layers import Embedding, FeedForward, Linear, Norm, Positions
from meshwright.runtime.loss import cross_entropy_sum
from meshwright.runtime.moe import MoE
from meshwright.runtime.region import Setting
from meshwright.runtime.selective import remaking


class Layer(nn.Module):
    """Attention and a feed-forward network or experts, each after a norm and beside the residual stream."""

    def __init__(self, setting: Setting, layer: int) -> None:
        super().__init__()
        model, self.setting = setting.model, setting
        remakes = setting.policy.recompute == "selective"
        self.attention_norm = Norm(model, model.hidden_size, remakes)
        self.attention = Attention(setting, layer)
        self.mlp_norm = Norm(model, model.hidden_size, remakes)
        self.moe: MoE | None = None
        self.mlp: FeedForward | None = None
        if model.is_moe_layer(layer):
            self.moe = MoE(setting, layer)
        else:
            self.mlp = FeedForward(setting, model.intermediate_size or 0, model.mlp_bias)

    def forward(self, x_SBH: Tensor, tokens: Tokens) -> Tensor:
        """[S, B, H] shares in and out."""
        match self.setting.policy.recompute:
            case "none":
                return self._run(x_SBH, tokens)
            case "selective":
                with remaking():
                    return self._run(x_SBH, tokens)
            case "full":
                return run_again(self._run, x_SBH, tokens)

    def _run(self, x_SBH: Tensor, tokens: Tokens) -> Tensor:
        x_SBH = x_SBH + self.attention(self.attention_norm(x_SBH), tokens)
        normed = self.mlp_norm(x_SBH)
        if self.moe is not None:
            return x_SBH + self.moe(normed, tokens)
        assert self.mlp is not None
        return x_SBH + self.mlp(normed)


class Stage(nn.Module):
    """The layers of one pipeline stage, with the embedding before the first and the head after the last.

    A stage with the head returns the loss of its micro-batch, a scalar; the others return their share of the
    residual stream.
    """

    def __init__(
        self, setting: Setting, layers: tuple[int, ...], has_embedding: bool, has_head: bool
    ) -> None:
        super().__init__()
        model, self.setting = setting.model, setting
        self.has_embedding, self.has_head = has_embedding, has_head
        tied = has_head and model.tie_word_embeddings
        self.embedding = Embedding(setting) if has_embedding or tied else None
        learned = has_embedding and model.position == "learned"
        self.positions = Positions(setting) if learned else None
        self.layers = nn.ModuleDict({str(layer): Layer(setting, layer) for layer in layers})
        self.norm = Norm(model, model.hidden_size) if has_head else None
        rows = -(-model.vocab_size // setting.mesh.size("tp"))
        self.head = Linear(model.hidden_size, rows) if has_head and not tied else None
        self.whole_sequences: dict[tuple[int, int], Tokens] = {}

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, S], or the residual stream [S, B, H] of the stage before.

        `targets`, `positions` and `documents` are [B, S] (see `data.Batch`); without the latter two each
        sequence is one document.
        """
        tokens = self._tokens(x, positions, documents)
        if self.has_embedding:
            x = self._embedded(x, tokens)
        for layer in self.layers.values():
            x = layer(x, tokens)
        if not self.has_head:
            return x
        if targets is None:
            raise ValueError("the stage with the head needs the targets")
        loss = cross_entropy_sum(self._logits_TV(x), targets.t().flatten(), self.setting)
        return loss * self.setting.scales.token

    def logits(self, x: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """The rank's share of the logits [S, B, V], in FP32; for a stage that is the whole model."""
        tokens = self._tokens(x, positions, documents)
        x = self._embedded(x, tokens) if self.has_embedding else x
        for layer in self.layers.values():
            x = layer(x, tokens)
        return self._logits_TV(x).unflatten(0, tokens.positions_SB.shape)

    def moe_layers(self) -> Iterator[MoE]:
        """The expert layers of this stage, in order; each knows its number in the model."""
        for layer in self.layers.values():
            if isinstance(layer, Layer) and layer.moe is not None:
                yield layer.moe

    def _tokens(self, x: Tensor, positions: Tensor | None, documents: Tensor | None) -> Tokens:
        if positions is not None:
            return Tokens(positions.t(), documents)
        batch, length = x.shape if self.has_embedding else (x.shape[1], self._whole_length(x))
        if documents is not None:
            return Tokens(_places(batch, length, x.device).t(), documents)
        if (batch, length) not in self.whole_sequences:  # the same for every micro-batch
            self.whole_sequences[batch, length] = Tokens(_places(batch, length, x.device).t())
        return self.whole_sequences[batch, length]

    def _whole_length(self, x_SBH: Tensor) -> int:
        return x_SBH.shape[0] * (self.setting.mesh.size("tp") if self.setting.divides_sequence else 1)

    def _embedded(self, tokens_BS: Tensor, tokens: Tokens) -> Tensor:
        assert self.embedding is not None
        x_SBH = self.embedding(tokens_BS.t())
        return x_SBH if self.positions is None else self.positions(x_SBH, tokens.positions_SB)

    def _logits_TV(self, x_SBH: Tensor) -> Tensor:
        assert self.norm is not None
        x_SBH = self.setting.enter(self.norm(x_SBH))
        table = self.embedding if self.head is None else self.head
        assert table is not None
        weight = table.weight
        return F.linear(x_SBH.flatten(0, 1), weight).float()


def _places(batch: int, length: int, device: torch.device) -> Tensor:
    """Positions [B, S] of sequences that are one document each."""
    return torch.arange(length, device=device).expand(batch, length)
