"""FairSeq MoE's top-2 gate, written out token by token.

fairseq's branch `moe` cannot be installed beside the rest, so the truth here is the gate as prose has it:
tokens in order, each expert a list that fills up. It shares only the draws with what is tested.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from meshwright.errors import InputError
from meshwright.model import Router
from meshwright.runtime.routing import GShard, gshard_balance, route, routing_counts, routing_log

ROUTER = Router(type="gshard_top2")
SETTINGS = list(itertools.product(("sampling", "random", "all"), (False, True), (False, True)))


@dataclass
class Gate:
    weights: list[dict[int, float]]
    overflow: list[float]
    loss: float
    shares: list[list[float]]


def gate(
    logits: Tensor, gshard: GShard, valid: list[bool], noise: Tensor, uniform: Tensor, training: bool
) -> Gate:
    gates = torch.softmax(logits, 1).tolist()
    num_experts = logits.shape[1]
    tokens = [t for t in range(len(gates)) if valid[t]]
    first = {t: max(range(num_experts), key=lambda e: gates[t][e]) for t in tokens}
    noisy = (logits + noise if gshard.second_expert_policy == "sampling" else logits).tolist()
    second = {
        t: max((e for e in range(num_experts) if e != first[t]), key=noisy[t].__getitem__) for t in tokens
    }
    pair = {t: [gates[t][first[t]], gates[t][second[t]]] for t in tokens}
    if gshard.normalize_before_dropping:
        pair = {t: [g / sum(pair[t]) for g in pair[t]] for t in tokens}
    asks = set(tokens)
    if gshard.second_expert_policy == "random":
        asks = {t for t in tokens if 2 * pair[t][1] > uniform[t]}
    limit = 2 * math.ceil(len(tokens) / num_experts) if training else math.ceil(0.25 * len(tokens))
    order = sorted(tokens, key=lambda t: -max(gates[t])) if gshard.batch_prioritized else tokens
    queue: dict[int, int] = dict.fromkeys(range(num_experts), 0)
    kept: dict[int, list[bool]] = {t: [False, False] for t in tokens}
    dropped = [0, 0]
    for number, chosen in enumerate((first, second)):
        for t in order:
            if number == 0 or t in asks:
                kept[t][number] = queue[chosen[t]] < limit
                dropped[number] += not kept[t][number]
                queue[chosen[t]] += 1
    weights: list[dict[int, float]] = [{} for _ in gates]
    for t in tokens:
        left = [g if k else 0.0 for g, k in zip(pair[t], kept[t], strict=True)]
        total = 1.0 if gshard.normalize_before_dropping else max(sum(left), torch.finfo(torch.float32).eps)
        weights[t] = {first[t]: left[0] / total, second[t]: left[1] / total}
    mean_gate = [sum(gates[t][e] for t in tokens) / len(tokens) for e in range(num_experts)]
    shares = [
        [sum(chosen[t] == e for t in tokens) / len(tokens) for e in range(num_experts)]
        for chosen in (first, second)
    ]
    loss = num_experts * sum(m * c for m, c in zip(mean_gate, shares[0], strict=True))
    overflow = [100 * dropped[0] / len(tokens), 100 * dropped[1] / max(len(asks), 1)]
    return Gate(weights, overflow, loss, shares)


def draws(seed: int, shape: torch.Size, policy: str) -> tuple[Tensor, Tensor]:
    """The Gumbel noise or the uniform numbers that a generator of that seed gives."""
    torch.manual_seed(seed)
    if policy == "random":
        return torch.zeros(shape), torch.rand(shape[0])
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    return torch.distributions.Gumbel(zero, one).rsample(shape), torch.zeros(shape[0])


@pytest.mark.parametrize(("policy", "before", "prioritized"), SETTINGS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_against_the_gate_written_out(
    policy: str, before: bool, prioritized: bool, training: bool, padded: bool
) -> None:
    gshard = GShard(
        second_expert_policy=policy,
        normalize_before_dropping=before,
        batch_prioritized=prioritized,
    )
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(37, 5, generator=generator) + torch.linspace(0, 2, 5)
    valid = torch.rand(37, generator=generator) < 0.7 if padded else torch.ones(37, dtype=torch.bool)
    noise, uniform = draws(3, logits.shape, policy)
    expected = gate(logits, gshard, valid.tolist(), noise, uniform, training)

    routing = route(
        logits,
        ROUTER,
        2,
        gshard=gshard,
        generator=torch.Generator().manual_seed(3),
        training=training,
        valid=valid if padded else None,
    )
    dense = torch.zeros(37, 5).scatter(1, routing.choices, routing.weights)
    truth = torch.tensor([[row.get(e, 0.0) for e in range(5)] for row in expected.weights])
    torch.testing.assert_close(dense, truth, rtol=1e-6, atol=1e-7)
    assert gshard_balance(routing, gshard).reported.item() == pytest.approx(expected.loss, rel=1e-6)
    log = routing_log(routing_counts(routing))
    for number, shares in enumerate(expected.shares, start=1):
        key = f"expert{number}_balance"
        assert log[f"overflow_expert{number}"].item() == pytest.approx(expected.overflow[number - 1])
        assert log[f"{key}_top"].item() == pytest.approx(100 * max(shares))
        assert log[f"{key}_bottom"].item() == pytest.approx(100 * min(shares))
        assert log[f"unused_expert{number}_count"].item() == shares.count(0.0)


def test_a_token_kept_by_one_expert_has_weight_one() -> None:
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 3, 4)
    routing = route(logits, ROUTER, 2, gshard=GShard(second_expert_policy="all"))
    alone = routing.kept.sum(1) == 1
    assert alone.any()
    assert torch.equal(routing.weights[alone].sum(1), torch.ones(int(alone.sum())))
    neither = routing.kept.sum(1) == 0
    assert neither.any()
    assert torch.equal(routing.weights[neither], torch.zeros(int(neither.sum()), 2))


@pytest.mark.parametrize(
    ("gshard", "training", "capacity"),
    [
        (GShard(), True, 20),
        (GShard(), False, 25),
        (GShard(eval_capacity_fraction=-1.0), False, 20),
        (GShard(eval_capacity_length=7), False, 2),
        (GShard(variant="fairscale"), True, 18),
        (GShard(variant="fairscale"), False, 18),
    ],
)
def test_capacity_of_97_tokens_over_10_experts(gshard: GShard, training: bool, capacity: int) -> None:
    if gshard.variant == "fairscale":
        capacity = 2 * 97 // 10
    assert gshard.capacity(97, 10, training) == capacity
    assert int(gshard.capacity(torch.tensor(97), 10, training)) == capacity


@pytest.mark.parametrize(
    ("router", "top_k", "bias"),
    [
        (ROUTER, 3, None),
        (ROUTER, 2, torch.zeros(4)),
        (ROUTER.model_copy(update={"num_groups": 2}), 2, None),
        (ROUTER.model_copy(update={"normalize": False}), 2, None),
    ],
)
def test_refuses_what_the_gate_does_not_have(router: Router, top_k: int, bias: Tensor | None) -> None:
    with pytest.raises(InputError, match="gshard_top2"):
        route(
            torch.randn(8, 4), router, top_k, correction_bias=bias, gshard=GShard(second_expert_policy="all")
        )
