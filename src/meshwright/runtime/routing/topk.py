"""Which experts a token chooses by its scores, and choices that are balanced by force.

Shape letters: T tokens of this rank, k choices of a token, E experts, G groups of experts, g kept groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.model import Router
from meshwright.runtime.routing.decision import Decision


def choose(scores_TE: Tensor, router: Router, top_k: int, correction_bias_E: Tensor | None = None) -> Tensor:
    """The k experts with the best scores, best first: [T, k] int64.

    `correction_bias_E` is added for this choice alone (DeepSeek-V3, arXiv:2412.19437 eq. 16). With groups,
    only experts of a token's best groups are eligible.
    """
    if correction_bias_E is not None:
        scores_TE = scores_TE + correction_bias_E.to(scores_TE.dtype)
    if router.num_limited_groups < router.num_groups:
        scores_TE = _within_best_groups(scores_TE, router)
    return scores_TE.topk(top_k, dim=-1).indices


def counted_choices(
    scores_TE: Tensor, router: Router, top_k: int, correction_bias_E: Tensor | None = None
) -> Tensor | None:
    """The choices that a balance loss counts, [T, k] int64; None when they are the router's own.

    DeepSeek-V3 counts the k best by score alone, with neither correction bias nor groups (arXiv:2412.19437
    eq. 18; megatron-core 0.16.1, moe_utils.py: compute_routing_scores_for_aux_loss). DeepSeek-V2's softmax
    router counts what it chose within its groups (arXiv:2405.04434 eq. 24).
    """
    limited = router.type == "sigmoid" and router.num_limited_groups < router.num_groups
    if correction_bias_E is None and not limited:
        return None
    return scores_TE.topk(top_k, dim=-1).indices


def _within_best_groups(scores_TE: Tensor, router: Router) -> Tensor:
    """Scores with −inf outside a token's best groups. A group's score is its best expert's under softmax
    (DeepSeek-V2, arXiv:2405.04434 §2.2.2), the sum of its two best under sigmoid (DeepSeek-V3, §2.1.2)."""
    num_tokens, num_experts = scores_TE.shape
    size = num_experts // router.num_groups
    grouped_TGe = scores_TE.view(num_tokens, router.num_groups, size)
    best = min(2, size) if router.type == "sigmoid" else 1
    group_scores_TG = grouped_TGe.topk(best, dim=-1).values.sum(dim=-1)
    groups_Tg = group_scores_TG.topk(router.num_limited_groups, dim=-1).indices
    closed_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, groups_Tg, False)
    return grouped_TGe.masked_fill(closed_TG[:, :, None], float("-inf")).view(num_tokens, num_experts)


def forced(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    *,
    first_token: int = 0,
    valid: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Decision:
    """A decision that spreads copies evenly whatever the scores: choice j of token t is ((first_token + t)·k
    + j) mod E. Given to `route`, weights still come from those experts' scores and carry gradients.

    Ranks continue one another when each passes the number of tokens before its own as `first_token`. Exactly
    balanced when k·(all tokens) is a multiple of E; nothing is dropped, padding (`valid` False) gets nothing.
    """
    copies_N = torch.arange(num_tokens * top_k, device=device) + first_token * top_k
    choices_Tk = (copies_N % num_experts).view(num_tokens, top_k)
    asked_Tk = everyone(valid, top_k)
    return Decision(choices_Tk, asked_Tk, asked_Tk)


def everyone(valid_T: Tensor | None, top_k: int) -> Tensor | None:
    """[T, k] bool: every copy of a real token; None without padding."""
    return None if valid_T is None else valid_T[:, None].expand(-1, top_k).contiguous()
