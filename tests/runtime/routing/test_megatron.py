"""Megatron-Core's routing functions, which run on the CPU."""

from __future__ import annotations

import pytest
import torch

from meshwright.model import Router
from meshwright.runtime.routing import Routing, batch_balance, route, sequence_balance, updated_bias, z_loss

moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")

TOKENS, EXPERTS, TOP_K = 96, 12, 3


def logits_of(seed: int, skew: float = 1.0) -> torch.Tensor:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return logits + skew * torch.linspace(0, 1, EXPERTS)


def dense(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's form: probs [T, E] and the routing map [T, E]."""
    kept = torch.ones_like(routing.choices, dtype=torch.bool) if routing.kept is None else routing.kept
    probs = torch.zeros(TOKENS, EXPERTS).scatter(1, routing.choices, routing.weights)
    return probs, torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, routing.choices, kept)


CASES = {
    "softmax_post": (Router(), {"use_pre_softmax": False}),
    "softmax_pre": (Router(normalize=False, scaling_factor=2.0), {"use_pre_softmax": True}),
    "sigmoid": (Router(type="sigmoid", scaling_factor=2.5), {"score_function": "sigmoid"}),
}


@pytest.mark.parametrize("drop", [None, "probs"])
@pytest.mark.parametrize("case", CASES)
def test_choice_then_dropping(case: str, drop: str | None) -> None:
    router, arguments = CASES[case]
    if router.scaling_factor != 1.0:
        arguments = arguments | {"scaling_factor": router.scaling_factor}
    logits = logits_of(0)
    probs, chosen = moe_utils.topk_routing_with_score_function(logits, TOP_K, **arguments)
    if drop is not None:
        probs, chosen = moe_utils.apply_router_token_dropping(probs, chosen, TOP_K, 0.7, drop)
        router = router.model_copy(update={"capacity_factor": 0.7, "drop": drop})
    ours, kept = dense(route(logits, router, TOP_K))
    torch.testing.assert_close(ours, probs, rtol=1e-6, atol=1e-7)
    assert torch.equal(kept, chosen)


def test_position_keeps_the_earliest_tokens_of_each_expert() -> None:
    """Megatron takes torch.topk of zeros and ones, which leaves open which of the equal copies stay; as many
    stay at each expert."""
    router = Router(capacity_factor=0.7, drop="position")
    logits = logits_of(1)
    probs, chosen = moe_utils.topk_routing_with_score_function(logits, TOP_K)
    _, megatron = moe_utils.apply_router_token_dropping(probs, chosen, TOP_K, 0.7, "position")
    _, kept = dense(route(logits, router, TOP_K))
    limit = moe_utils.get_capacity(TOKENS * TOP_K, EXPERTS, 0.7)
    assert torch.equal(kept, chosen & (chosen.int().cumsum(0) <= limit))
    assert torch.equal(kept.sum(0), megatron.sum(0))


@pytest.mark.parametrize(("groups", "limited"), [(3, 1), (6, 3)])
def test_groups_and_correction_bias(groups: int, limited: int) -> None:
    """Megatron sums the best k/limited of a group; 2·limited choices make that DeepSeek-V3's two."""
    top_k = 2 * limited
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(9))
    probs, _ = moe_utils.topk_routing_with_score_function(
        logits_of(2),
        top_k,
        num_groups=groups,
        group_topk=limited,
        score_function="sigmoid",
        expert_bias=bias,
    )
    router = Router(type="sigmoid", correction_bias=True, num_groups=groups, num_limited_groups=limited)
    ours, _ = dense(route(logits_of(2), router, top_k, correction_bias=bias))
    torch.testing.assert_close(ours, probs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("router_type", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_over_the_batch_and_over_sequences(router_type: str, padded: bool) -> None:
    valid = torch.arange(TOKENS) % 48 < 40 if padded else None
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(9))
    bias = bias if router_type == "sigmoid" else None
    router = Router(type=router_type, correction_bias=bias is not None, aux_loss=0.01)
    theirs = logits_of(3).requires_grad_()
    padding = None if valid is None else ~valid
    chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(
        theirs, TOP_K, router_type, padding_mask=padding
    )
    num_valid = TOKENS if valid is None else int(valid.sum())
    expected = moe_utils.switch_load_balancing_loss_func(
        scores, chosen.sum(0), num_valid, TOP_K, EXPERTS, 1.0
    )
    by_sequence = sum(
        moe_utils.switch_load_balancing_loss_func(
            scores[part], chosen[part].sum(0), num_valid // 2, TOP_K, EXPERTS, 1.0
        )
        for part in (slice(0, 48), slice(48, 96))
    )
    ours = logits_of(3).requires_grad_()
    routing = route(ours, router, TOP_K, valid=valid, correction_bias=bias)
    sequences = torch.arange(TOKENS) // 48
    for loss, truth in (
        (batch_balance(routing).loss, expected),
        (sequence_balance(routing, sequences, 2).loss, by_sequence),
    ):
        torch.testing.assert_close(loss, truth, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(loss, ours, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(truth, theirs, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss(padded: bool) -> None:
    valid = torch.arange(TOKENS) % 48 < 40 if padded else None
    mean = moe_utils.z_loss_func(logits_of(4), 1.0, None if valid is None else ~valid)
    num_valid = TOKENS if valid is None else valid.sum()
    torch.testing.assert_close(z_loss(logits_of(4), valid) / num_valid, mean, rtol=1e-6, atol=0)


def test_correction_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    monkeypatch.setattr(
        moe_utils.parallel_state, "get_tensor_and_data_parallel_group", lambda with_context_parallel: None
    )
    counts = torch.tensor([[7, 3, 5, 5], [0, 0, 0, 8]])
    bias = torch.randn(2, 4)
    expected = moe_utils.get_updated_expert_bias(counts.float(), bias, 1e-3)
    assert torch.equal(updated_bias(bias, counts, 1e-3), expected)
