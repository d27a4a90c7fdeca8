"""The routers of Hugging Face's model classes, fed the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from meshwright.model import Router
from meshwright.runtime.routing import batch_balance, route

TOKENS, HIDDEN, EXPERTS = 64, 16, 16

SOFTMAX = {
    "mixtral": (
        lambda: MixtralTopKRouter(
            MixtralConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2)
        ),
        Router(type="softmax", normalize=True),
        2,
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeTopKRouter(
            Qwen3MoeConfig(
                hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=8, norm_topk_prob=True
            )
        ),
        Router(type="softmax", normalize=True),
        8,
    ),
    "olmoe": (
        lambda: OlmoeTopKRouter(
            OlmoeConfig(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=8, norm_topk_prob=False)
        ),
        Router(type="softmax", normalize=False),
        8,
    ),
}


def tokens_and_weight(module: nn.Module) -> Tensor:
    """Random tokens; the module's weight is drawn too (some classes start it at 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
    return torch.randn(TOKENS, HIDDEN, generator=generator)


def dense(choices: Tensor, weights: Tensor, num_experts: int = EXPERTS) -> Tensor:
    """[T, E] weights, 0 where not chosen: the order of choices does not matter here."""
    return torch.zeros(len(choices), num_experts).scatter(1, choices, weights.float())


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_routers_bit_for_bit(name: str) -> None:
    build, router, top_k = SOFTMAX[name]
    module = build()
    x = tokens_and_weight(module)
    logits, weights, choices = module(x)
    routing = route(logits, router, top_k)
    assert torch.equal(routing.choices, choices)
    assert torch.equal(routing.weights, weights)
    assert routing.kept is None


def test_gpt_oss_softmax_over_the_chosen_equals_normalised_softmax() -> None:
    config = GptOssConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=4)
    module = GptOssTopKRouter(config)
    x = tokens_and_weight(module)
    with torch.no_grad():
        module.bias.copy_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)))
    logits, weights, choices = module(x)
    routing = route(logits, Router(type="softmax", normalize=True, bias=True), 4)
    assert torch.equal(routing.choices, choices)
    torch.testing.assert_close(routing.weights, weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 4])
def test_deepseek_v2(groups: int) -> None:
    config = DeepseekV2Config(
        num_attention_heads=4,
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=min(2, groups),
        topk_method="greedy" if groups == 1 else "group_limited_greedy",
        routed_scaling_factor=16.0,
    )
    module = DeepseekV2TopkRouter(config)
    logits, weights, choices = module(tokens_and_weight(module))
    router = Router(
        normalize=False, scaling_factor=16.0, num_groups=groups, num_limited_groups=min(2, groups)
    )
    routing = route(logits, router, 4)
    assert torch.equal(dense(routing.choices, routing.weights), dense(choices, weights))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "limited"), [(1, 1), (4, 2), (8, 4)])
def test_deepseek_v3(normalize: bool, groups: int, limited: int) -> None:
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=limited,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    module = DeepseekV3TopkRouter(config)
    x = tokens_and_weight(module)
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2))
    module.e_score_correction_bias.copy_(bias)
    logits, weights, choices = module(x)
    router = Router(
        type="sigmoid",
        normalize=normalize,
        correction_bias=True,
        scaling_factor=2.5,
        num_groups=groups,
        num_limited_groups=limited,
    )
    routing = route(logits, router, 4, correction_bias=bias)
    assert torch.equal(dense(routing.choices, torch.ones(TOKENS, 4)), dense(choices, torch.ones(TOKENS, 4)))
    torch.testing.assert_close(
        dense(routing.choices, routing.weights), dense(choices, weights), rtol=1e-6, atol=0
    )


def test_half_precision_logits_are_scored_in_fp32() -> None:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing, wide = (route(x, Router(), 2) for x in (logits, logits.float()))
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.weights, wide.weights)
    assert torch.equal(routing.choices, wide.choices)


@pytest.mark.parametrize("padded", [False, True])
def test_batch_balance_is_mixtrals_over_k(padded: bool) -> None:
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    mask = torch.arange(TOKENS).view(2, -1) % 32 < 20 if padded else None
    expected = load_balancing_loss_func((logits,), EXPERTS, 2, None if mask is None else mask.long())
    routing = route(logits, Router(), 2, valid=None if mask is None else mask.flatten())
    torch.testing.assert_close(batch_balance(routing).loss, expected / 2, rtol=1e-6, atol=0)
