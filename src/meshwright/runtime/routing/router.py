"""From logits to routing: decide, or take a decision as given; then weigh.

Shape letters: T tokens of this rank, k choices of a token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.errors import InputError
from meshwright.model import Router
from meshwright.runtime.routing import gshard as top2
from meshwright.runtime.routing.capacity import drop
from meshwright.runtime.routing.decision import Decision, Routing
from meshwright.runtime.routing.gshard import GShard
from meshwright.runtime.routing.scores import combine_weights, scores, visible
from meshwright.runtime.routing.topk import choose, counted_choices, everyone

FAIRSEQ = GShard()


def route(
    logits_TE: Tensor,
    router: Router,
    top_k: int,
    *,
    valid: Tensor | None = None,
    correction_bias: Tensor | None = None,
    gshard: GShard = FAIRSEQ,
    generator: torch.Generator | None = None,
    training: bool = True,
    decision: Decision | None = None,
) -> Routing:
    """Choose k experts for each token and weigh them.

    logits_TE: [T, E] of any float type, a learned bias already in them; scores are computed in FP32.
    valid: [T] bool, False for padding, which gets no expert and counts nowhere.
    correction_bias: [E], added to the scores for the choice alone (softmax and sigmoid routers).
    gshard, generator, training: only for `gshard_top2`: what the router's keys do not say, the source of its
        draws on the logits' device, and whether training's capacity or evaluation's holds.
    decision: what an earlier call decided, or `forced`. Nothing is chosen, drawn or dropped anew: only
        weights and scores are computed, by the same operations as in a first call.

    Raises InputError for settings that no router has together.
    """
    _check(router, top_k, correction_bias)
    logits_TE = visible(logits_TE, valid)
    scores_TE = scores(logits_TE, router.type)
    if decision is None:
        with torch.no_grad():
            if router.type == "gshard_top2":
                decision = top2.decide(logits_TE, scores_TE, gshard, valid, generator, training)
            else:
                decision = _decide(scores_TE, router, top_k, valid, correction_bias)
    if router.type == "gshard_top2":
        weights_Tk = top2.combine_weights(scores_TE, decision, gshard)
    else:
        weights_Tk = combine_weights(scores_TE, decision.choices, decision.kept, router)
    return Routing(weights_Tk, decision, scores_TE, router.type, valid)


def _decide(
    scores_TE: Tensor, router: Router, top_k: int, valid_T: Tensor | None, correction_bias_E: Tensor | None
) -> Decision:
    choices_Tk = choose(scores_TE, router, top_k, correction_bias_E)
    asked_Tk = kept_Tk = everyone(valid_T, top_k)
    if router.capacity_factor is not None:
        weights_Tk = combine_weights(scores_TE, choices_Tk, None, router)
        kept_Tk = drop(weights_Tk, choices_Tk, asked_Tk, router, scores_TE.shape[1])
    counted_Tk = counted_choices(scores_TE, router, top_k, correction_bias_E) if router.aux_loss else None
    return Decision(choices_Tk, kept_Tk, asked_Tk, counted_Tk)


def _check(router: Router, top_k: int, correction_bias_E: Tensor | None) -> None:
    if router.type != "gshard_top2":
        return
    if top_k != 2:
        raise InputError("num_experts_per_tok", top_k, "a gshard_top2 router chooses two", [2])
    if correction_bias_E is not None or router.correction_bias:
        raise InputError("router.correction_bias", True, "a gshard_top2 router has none", [False])
    if router.num_limited_groups < router.num_groups:
        raise InputError("router.num_groups", router.num_groups, "a gshard_top2 router has none", [1])
    if not router.normalize or router.scaling_factor != 1.0:
        rule = "a gshard_top2 router divides its two gates by their sum and scales them no further"
        raise InputError("router.normalize", router.normalize, rule, ["normalize: true, scaling_factor: 1"])
