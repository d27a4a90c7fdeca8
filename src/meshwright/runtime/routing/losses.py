"""Losses that balance experts and keep logits small, as sums, and the way they enter a backward pass.

A balance loss is over a set of tokens that several ranks may share (a sequence under tensor or context
parallelism). Each rank passes `add_over_ranks`, which adds a tensor up over those ranks; it is called once
per loss, with one FP32 tensor of [2·N, E]: the counts of N token sets, then their sums of probabilities.

Shape letters: T tokens of this rank, k counted choices of a token, E experts, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.runtime.routing.capacity import count
from meshwright.runtime.routing.decision import Routing
from meshwright.runtime.routing.gshard import GShard
from meshwright.runtime.routing.scores import visible

AddOverRanks = Callable[[Tensor], Tensor]


def alone(sums: Tensor) -> Tensor:
    """`add_over_ranks` of a rank that shares its tokens with no other."""
    return sums


@dataclass(frozen=True)
class Balance:
    """A balance loss of one micro-batch.

    loss: this rank's share, 0-dim: Σ over the sharing ranks is the loss, and its gradients are the loss's.
        Counts, and so f_i, are constants; the gradient flows through this rank's own probabilities.
    reported: the whole loss, 0-dim FP32, without gradient, the same on all sharing ranks.
    sums: [2·N, E] FP32, added up over the ranks. Given back to the same loss they replay it without
        communicating and without counting anew.
    """

    loss: Tensor
    reported: Tensor
    sums: Tensor


def sequence_balance(
    routing: Routing,
    sequence: Tensor | None,
    num_sequences: int,
    add_over_ranks: AddOverRanks = alone,
    sums: Tensor | None = None,
) -> Balance:
    """Σ over sequences s of Σ_i f_i·P_i: over the valid tokens of each sequence, on all ranks that share it.

    f_i = E/(k·T_s)·Σ_{t∈s} 1[i counted for t], P_i = 1/T_s·Σ_{t∈s} p_it (DeepSeek-V3, arXiv:2412.19437
    eq. 17–20; T_s follows from the counts, whose sum is k·T_s). 1 per sequence when balanced. The same for
    every layout and micro-batch size; divide by the number of sequences in the global batch for a mean.
    A sequence of padding alone gives 0.

    sequence: [T] int64 in [0, num_sequences); None when all tokens are of one sequence.
    """
    f_NE, p_NE, f_all_NE, p_all_NE, sums = _shares(
        routing, sequence, num_sequences, None, add_over_ranks, sums
    )
    return Balance((f_NE * p_NE).sum(), (f_all_NE * p_all_NE).sum(), sums)


def batch_balance(
    routing: Routing, add_over_ranks: AddOverRanks = alone, sums: Tensor | None = None
) -> Balance:
    """E·Σ_i(c_i·Σ_t p_it)/(k·T²): over all valid tokens of a micro-batch, on all ranks that share it.

    c_i are the copies counted for expert i (Switch, arXiv:2101.03961 eq. 4–6, for k choices; megatron-core
    0.16.1, moe_utils.py: switch_load_balancing_loss_func). 1 when balanced. It depends on the micro-batch
    size: a micro-batch balances as a whole what its sequences need not.
    """
    f_NE, p_NE, f_all_NE, p_all_NE, sums = _shares(routing, None, 1, None, add_over_ranks, sums)
    return Balance((f_NE * p_NE).sum(), (f_all_NE * p_all_NE).sum(), sums)


def gshard_balance(
    routing: Routing,
    gshard: GShard,
    add_over_ranks: AddOverRanks = alone,
    sums: Tensor | None = None,
) -> Balance:
    """E·Σ_i me_i·ce_i over the valid tokens of a micro-batch: me the mean gate, ce the share of first
    choices, counted before capacity drops any (GShard, arXiv:2006.16668; fairseq branch `moe`, top2gate.py).

    The variant `fairscale` has mean_i(me_i·ce_i), which is E² times smaller (fairscale 0.4.13, top2gate.py).
    """
    f_NE, p_NE, f_all_NE, p_all_NE, sums = _shares(routing, None, 1, 1, add_over_ranks, sums)
    scale = 1.0 if gshard.variant == "fairseq" else routing.num_experts**-2
    return Balance((f_NE * p_NE).sum() * scale, (f_all_NE * p_all_NE).sum() * scale, sums)


def z_loss(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Σ_t logsumexp(logits_t)² over this rank's valid tokens (ST-MoE, arXiv:2202.08906 eq. 5, where it is a
    mean): 0-dim FP32. logits: [T, E] of any float type; valid: [T] bool."""
    square_T = visible(logits, valid).logsumexp(dim=-1).square()
    return square_T.sum() if valid is None else square_T.masked_fill(~valid, 0.0).sum()


def _shares(
    routing: Routing,
    sequence_T: Tensor | None,
    num_sequences: int,
    num_counted: int | None,
    add_over_ranks: AddOverRanks,
    sums: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """f_i; this rank's share of P_i, differentiable; f_i and P_i for reporting; the sums they are made of.

    f_i is the same twice but for its type, which follows the scores' once. All are [N, E].
    """
    own_NE = _probability_sums(routing, sequence_T, num_sequences)
    if sums is None:
        counts_NE = _counts(routing, sequence_T, num_sequences, num_counted)
        sums = add_over_ranks(torch.cat((counts_NE.float(), own_NE.detach().float())))
    counts_NE, all_NE = sums.chunk(2)
    copies_N1 = counts_NE.sum(dim=1, keepdim=True)
    f_NE = routing.num_experts * counts_NE / copies_N1.clamp(min=1.0)
    top_k = num_counted or routing.choices.shape[1]
    tokens_N1 = (copies_N1 / top_k).clamp(min=1.0)
    return f_NE.to(own_NE.dtype), own_NE / tokens_N1, f_NE, all_NE / tokens_N1, sums


def _probability_sums(routing: Routing, sequence_T: Tensor | None, num_sequences: int) -> Tensor:
    """Σ_t p_it of each sequence's valid tokens: [N, E], differentiable.

    A product with the [N, T] membership, in FP64: additions by index have no fixed order on a GPU, and FP64
    is untouched by TF32 and autocast.
    """
    p_TE = routing.probabilities
    if sequence_T is None:
        member_NT = torch.ones(1, p_TE.shape[0], dtype=torch.bool, device=p_TE.device)
    else:
        number_N = torch.arange(num_sequences, device=p_TE.device)
        member_NT = number_N[:, None] == sequence_T
    if routing.valid is not None:
        member_NT = member_NT & routing.valid
    return (member_NT.double() @ p_TE.double()).to(p_TE.dtype)


def _counts(
    routing: Routing, sequence_T: Tensor | None, num_sequences: int, num_counted: int | None
) -> Tensor:
    """Counted choices of each sequence's valid tokens: [N, E] int64, exact in FP32 up to 2²⁴."""
    counted_Tk = routing.choices if routing.decision.counted is None else routing.decision.counted
    counted_Tk = counted_Tk[:, :num_counted]
    place_Tk = counted_Tk if sequence_T is None else counted_Tk + sequence_T[:, None] * routing.num_experts
    asked_Tk = None if routing.valid is None else routing.valid[:, None].expand_as(place_Tk)
    asked_N = None if asked_Tk is None else asked_Tk.flatten()
    counts = count(place_Tk.flatten(), num_sequences * routing.num_experts, asked_N)
    return counts.view(num_sequences, routing.num_experts)


def attach(weights: Tensor, loss: Tensor) -> Tensor:
    """`weights` as they are, such that a backward pass through them also runs `loss` backward, with
    d(total)/d(loss) = 1.

    A pipeline stage that is not the last has no loss of its own to add to; multiply `loss` by its
    coefficient and by FP16's loss scale first. The result must be used in what is differentiated: `loss`
    enters exactly when the gradient of the returned tensor is computed. It keeps no tensor, so that a
    recomputed forward pass adds nothing (the mechanism of megatron-core's MoEAuxLossAutoScaler).
    """
    result: Tensor = _Attach.apply(weights, loss)
    return result


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradient, torch.ones(shape, dtype=dtype, device=device)
