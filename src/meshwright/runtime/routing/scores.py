"""From logits to scores, and from the scores of the chosen to their weights.

Shape letters: T tokens of this rank, k choices of a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.model import Router

# Keeps a token whose sigmoid scores all underflow from dividing by 0 (DeepSeek-V3 and Megatron-Core add it).
TINY = 1e-20


def visible(logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Logits in FP32 with those of padding set to 0, so that nothing of padding, not even a NaN, reaches a
    score or a gradient. FP64 stays FP64, which numeric gradient checks need."""
    wide_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    return wide_TE if valid_T is None else wide_TE.masked_fill(~valid_T[:, None], 0.0)


def scores(logits_TE: Tensor, router_type: str) -> Tensor:
    """softmax over the experts, or sigmoid of each: [T, E] in the logits' type."""
    return torch.sigmoid(logits_TE) if router_type == "sigmoid" else torch.softmax(logits_TE, dim=-1)


def probabilities(scores_TE: Tensor, router_type: str) -> Tensor:
    """Scores that sum to 1 for each token: s_i / Σ_j s_j (DeepSeek-V3, arXiv:2412.19437 eq. 19)."""
    if router_type != "sigmoid":
        return scores_TE
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + TINY)


def combine_weights(scores_TE: Tensor, choices_Tk: Tensor, kept_Tk: Tensor | None, router: Router) -> Tensor:
    """What each chosen expert's output is multiplied by: [T, k], 0 for dropped copies.

    w_j = s_j / Σ_chosen s under `normalize`, else s_j; times `scaling_factor`. The sum is over all that were
    chosen, dropped or not: dropping comes last (megatron-core 0.16.1, moe_utils.py:
    topk_routing_with_score_function, then apply_router_token_dropping).
    """
    weights_Tk = scores_TE.gather(1, choices_Tk)
    if router.normalize:
        total_T1 = weights_Tk.sum(dim=-1, keepdim=True)
        weights_Tk = weights_Tk / (total_T1 + TINY if router.type == "sigmoid" else total_T1)
    if router.scaling_factor != 1.0:
        weights_Tk = weights_Tk * router.scaling_factor
    return weights_Tk if kept_Tk is None else weights_Tk.masked_fill(~kept_Tk, 0.0)
