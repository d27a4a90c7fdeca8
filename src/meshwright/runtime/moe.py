"""The expert layer: router, shared experts, routed experts.

Shape letters: S and B as everywhere, T = S·B tokens of this rank, K chosen experts of each, E experts,
L experts of this rank, F a rank's share of an expert's width, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.model import Model
from meshwright.model import Router as RouterSettings
from meshwright.runtime.attention import Tokens
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.dispatch import dispatch
from meshwright.runtime.layers import FeedForward, Linear, product
from meshwright.runtime.permute import grouped_matmul
from meshwright.runtime.region import Setting
from meshwright.runtime.routing import (
    Balance,
    Decision,
    GShard,
    Routing,
    RoutingCounts,
    attach,
    batch_balance,
    forced,
    gshard_balance,
    route,
    routing_counts,
    sequence_balance,
    z_loss,
)
from meshwright.runtime.tape import current_tape


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
        corrected = torch.zeros(model.num_experts) if model.router.correction_bias else None
        self.correction_bias: Tensor | None
        self.register_buffer("correction_bias", corrected)

    def forward(self, x_TH: Tensor) -> Tensor:
        """[T, E], in FP32."""
        return F.linear(x_TH, self.weight, self.bias).float()


class MoE(nn.Module):
    """Router, shared experts, dispatch, routed experts, combine.

    `counts` and `balance` add up over the micro-batches of a step what routing did and what the balance loss
    was, for whoever logs them; runs that only make activations again add nothing.
    """

    def __init__(self, setting: Setting, layer: int) -> None:
        super().__init__()
        model, self.setting, self.layer = setting.model, setting, layer
        self.router = Router(model)
        self.experts = Experts(setting)
        width = model.shared_width
        self.shared = FeedForward(setting, width, bias=False) if width else None
        gated = bool(width) and model.shared_expert_gate
        self.shared_gate = Linear(model.hidden_size, 1) if gated else None
        self.counts: RoutingCounts | None = None
        self.balance: Tensor | None = None
        self.generator = torch.Generator(setting.mesh.device)

    def forward(self, x_SBH: Tensor, tokens: Tokens) -> Tensor:
        """Normed [S, B, H] shares in, [S, B, H] shares out."""
        x_TH = x_SBH.flatten(0, 1)
        logits_TE = self.router(x_TH)
        routing = self._routed(logits_TE, tokens)
        weights_TK = self._with_losses(routing, logits_TE, x_SBH.shape[1])
        shared = None if self.shared is None else self.shared(x_SBH)
        if shared is not None and self.shared_gate is not None:
            shared = shared * self.shared_gate(x_SBH).sigmoid()
        choices_TK = routing.choices
        if routing.kept is not None:
            choices_TK = choices_TK.masked_fill(~routing.kept, -1)
        routed = dispatch(self.setting, x_TH, choices_TK, weights_TK, self.experts).view_as(x_SBH)
        return routed if shared is None else routed + shared

    def _routed(self, logits_TE: Tensor, tokens: Tokens) -> Routing:
        """Decide, or replay what was decided before; and count, unless it is a replay."""
        model, tape = self.setting.model, current_tape()
        valid_T = self._valid(tokens)
        decision = tape.next_decision() if tape is not None else None
        if decision is None and self.setting.routes_evenly:
            decision = self._even(logits_TE, valid_T)
        routing = route(
            logits_TE,
            model.router,
            model.num_experts_per_tok,
            valid=valid_T,
            correction_bias=self.router.correction_bias,
            gshard=gshard_of(model.router),
            generator=self.generator,
            decision=decision,
        )
        if tape is None or not tape.replays:
            counts = routing_counts(routing)
            self.counts = counts if self.counts is None else self.counts + counts
            if tape is not None:
                tape.decisions.append(routing.decision)
        return routing

    def _even(self, logits_TE: Tensor, valid_T: Tensor | None) -> Decision:
        num_tokens, num_experts = logits_TE.shape
        place = self.setting.mesh.position("ep") * num_tokens
        top_k = self.setting.model.num_experts_per_tok
        return forced(
            num_tokens, top_k, num_experts, first_token=place, valid=valid_T, device=logits_TE.device
        )

    def _valid(self, tokens: Tokens) -> Tensor | None:
        if tokens.documents_BS is None or not tokens.has_padding:
            return None
        return self.setting.own_tokens(tokens.documents_BS.t() >= 0).flatten()

    def _with_losses(self, routing: Routing, logits_TE: Tensor, num_sequences: int) -> Tensor:
        """The weights, through whose gradient those of the router's own losses enter."""
        settings, scales = self.setting.model.router, self.setting.scales
        losses: list[Tensor] = []
        if settings.aux_loss:
            balance = self._balance(routing, num_sequences)
            by_sequence = self._by_sequence
            worth = scales.sequence if by_sequence else scales.micro_batch
            losses.append(balance.loss * (settings.aux_loss * worth))
            tape = current_tape()
            if tape is None or not tape.replays:
                value = balance.reported * (settings.aux_loss * worth * scales.inverse)
                self.balance = value if self.balance is None else self.balance + value
        if settings.z_loss:
            losses.append(z_loss(logits_TE, routing.valid) * (settings.z_loss * scales.token))
        return attach(routing.weights, torch.stack(losses).sum()) if losses else routing.weights

    @property
    def _by_sequence(self) -> bool:
        settings = self.setting.model.router
        return settings.aux_loss_scope == "sequence" and settings.type != "gshard_top2"

    def _balance(self, routing: Routing, num_sequences: int) -> Balance:
        group = self.setting.mesh.group("tp") if self.setting.divides_sequence else None

        def add_over_ranks(sums: Tensor) -> Tensor:
            return all_reduce(sums, group)

        settings = self.setting.model.router
        if settings.type == "gshard_top2":
            return gshard_balance(routing, gshard_of(settings), add_over_ranks)
        if settings.aux_loss_scope == "batch":
            return batch_balance(routing, add_over_ranks)
        # tokens stand sequence-first: one of each sequence after another
        sequence_T = torch.arange(routing.scores.shape[0], device=routing.scores.device) % num_sequences
        return sequence_balance(routing, sequence_T, num_sequences, add_over_ranks)


def gshard_of(settings: RouterSettings) -> GShard:
    """The top-2 gate that a router's keys describe."""
    return GShard(
        second_expert_policy=settings.second_expert,
        normalize_before_dropping=settings.normalize_before_dropping,
        batch_prioritized=settings.batch_prioritized,
    )
