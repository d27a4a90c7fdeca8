"""What holds of every router: capacity, distinct choices, replay, and padding that nobody can see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.model import Router
from meshwright.runtime.routing import (
    GShard,
    Routing,
    forced,
    gshard_balance,
    route,
    routing_counts,
    sequence_balance,
    z_loss,
)


@dataclass(frozen=True)
class Case:
    router: Router
    top_k: int
    gshard: GShard
    num_tokens: int
    num_experts: int
    seed: int

    def logits(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.num_tokens, self.num_experts, generator=generator)
        return logits + torch.randn(self.num_experts, generator=generator)

    @property
    def bias(self) -> Tensor | None:
        if not self.router.correction_bias:
            return None
        return torch.randn(self.num_experts, generator=torch.Generator().manual_seed(self.seed + 1))

    def route(self, logits: Tensor, **arguments: object) -> Routing:
        return route(
            logits,
            self.router,
            self.top_k,
            correction_bias=self.bias,
            gshard=self.gshard,
            generator=torch.Generator().manual_seed(self.seed),
            **arguments,
        )

    def capacity(self, num_tokens: int) -> int:
        if self.router.type == "gshard_top2":
            return 2 * math.ceil(num_tokens / self.num_experts)
        if self.router.capacity_factor is None:
            return num_tokens
        return math.ceil(num_tokens * self.top_k / self.num_experts * self.router.capacity_factor)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["softmax", "sigmoid", "gshard_top2"]))
    num_experts = draw(st.sampled_from([4, 6, 8, 12]))
    num_tokens, seed = draw(st.integers(1, 40)), draw(st.integers(0, 10_000))
    if kind == "gshard_top2":
        gshard = GShard(
            second_expert_policy=draw(st.sampled_from(["sampling", "random", "all"])),
            normalize_before_dropping=draw(st.booleans()),
            batch_prioritized=draw(st.booleans()),
        )
        return Case(Router(type=kind), 2, gshard, num_tokens, num_experts, seed)
    groups = draw(st.sampled_from([1, 2]))
    drop = draw(st.sampled_from([None, "probs", "position"]))
    router = Router(
        type=kind,
        normalize=draw(st.booleans()),
        correction_bias=draw(st.booleans()),
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_groups=groups,
        num_limited_groups=1,
        capacity_factor=None if drop is None else draw(st.sampled_from([0.3, 0.75, 1.0, 1.25])),
        drop=drop,
        aux_loss=0.01,
    )
    return Case(router, draw(st.integers(1, num_experts // groups)), GShard(), num_tokens, num_experts, seed)


few = settings(max_examples=60, deadline=None)


@few
@given(cases())
def test_choices_are_distinct_and_capacity_holds(case: Case) -> None:
    routing = case.route(case.logits())
    ordered = routing.choices.sort(dim=1).values
    assert (ordered.diff(dim=1) > 0).all()
    assert int(ordered.min()) >= 0
    assert int(ordered.max()) < case.num_experts
    kept = torch.ones_like(routing.choices, dtype=torch.bool) if routing.kept is None else routing.kept
    held = torch.bincount(routing.choices[kept], minlength=case.num_experts)
    assert int(held.max()) <= case.capacity(case.num_tokens)
    assert (routing.weights[~kept] == 0).all()
    assert (routing.weights >= 0).all()
    counts = routing_counts(routing)
    asked = int(counts.offered.sum())
    assert int(counts.dropped) == asked - int(kept.sum())
    full = counts.offered.clamp(max=case.capacity(case.num_tokens))
    assert torch.equal(held, full)  # nobody is dropped while there is room


@few
@given(cases())
def test_replay_is_the_first_run_bit_for_bit(case: Case) -> None:
    pull = torch.randn(case.num_tokens, case.top_k, generator=torch.Generator().manual_seed(0))
    sequences = torch.arange(case.num_tokens) % 2
    results = []
    decision, sums = None, None
    for _ in range(2):
        logits = case.logits().requires_grad_()
        routing = case.route(logits, decision=decision)
        balance = sequence_balance(routing, sequences, 2, sums=sums)
        ((routing.weights * pull).sum() + balance.loss).backward()
        results.append((routing.choices, routing.weights.detach(), balance.reported, logits.grad))
        decision, sums = routing.decision, balance.sums
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@few
@given(cases())
def test_replay_decides_nothing_anew(case: Case) -> None:
    """Even when other logits come along: choices and dropping stay, weights follow."""
    first = case.route(case.logits())
    other = case.logits().flip(1)
    routing = case.route(other, decision=first.decision)
    assert routing.decision is first.decision
    if first.kept is not None:
        assert (routing.weights[~first.kept] == 0).all()


@few
@given(cases(), st.integers(1, 20))
def test_padding_is_invisible(case: Case, num_padding: int) -> None:
    """Tokens among padding that holds NaN are routed as without it, and no gradient reaches padding.

    Draws are made per position, so those that draw are compared where padding comes last. On a CPU sigmoid
    and softmax may differ in the last bit between positions, by where vector instructions end."""
    total = case.num_tokens + num_padding
    draws = case.router.type == "gshard_top2" and case.gshard.second_expert_policy != "all"
    order = torch.randperm(total, generator=torch.Generator().manual_seed(case.seed))
    real = torch.arange(case.num_tokens) if draws else order[: case.num_tokens].sort().values
    valid = torch.zeros(total, dtype=torch.bool).index_fill(0, real, True)
    padded = torch.full((total, case.num_experts), float("nan"))
    padded[real] = case.logits()
    padded.requires_grad_()
    alone = case.logits().requires_grad_()
    sequences = torch.arange(total) % 3

    bare = case.route(alone)
    routing = case.route(padded, valid=valid)
    assert torch.equal(routing.choices[real], bare.choices)
    torch.testing.assert_close(routing.weights[real], bare.weights, rtol=1e-6, atol=0)
    assert not routing.kept[~valid].any()
    if bare.kept is not None:
        assert torch.equal(routing.kept[real], bare.kept)
    losses = [
        sequence_balance(r, s, 3).loss + gshard_balance(r, case.gshard).loss + z_loss(x, v)
        for r, s, x, v in ((routing, sequences, padded, valid), (bare, sequences[real], alone, None))
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss, r in zip(losses, (routing, bare), strict=True):
        (loss + r.weights.square().sum()).backward()
    torch.testing.assert_close(padded.grad[real], alone.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(padded.grad[~valid], torch.zeros(num_padding, case.num_experts))
    packed = (routing_counts(r).packed() for r in (routing, bare))
    torch.testing.assert_close(*packed, rtol=1e-6, atol=0)


def test_only_padding() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    nothing = torch.zeros(6, dtype=torch.bool)
    for router in (Router(), Router(type="sigmoid", capacity_factor=1.0), Router(type="gshard_top2")):
        gshard = GShard(second_expert_policy="all")
        routing = route(logits, router, 2, valid=nothing, gshard=gshard)
        loss = sequence_balance(routing, None, 1).loss + z_loss(logits, nothing)
        (gradient,) = torch.autograd.grad(loss + routing.weights.sum(), logits)
        assert loss.item() == 0
        assert torch.equal(gradient, torch.zeros(6, 4))


@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from([4, 8, 12]), st.data())
def test_forced_is_balanced_over_ranks_that_continue_one_another(
    top_k: int, rounds: int, num_experts: int, data: st.DataObject
) -> None:
    num_tokens = rounds * num_experts
    cut = data.draw(st.integers(0, num_tokens))
    parts = [forced(cut, top_k, num_experts), forced(num_tokens - cut, top_k, num_experts, first_token=cut)]
    choices = torch.cat([part.choices for part in parts])
    assert torch.equal(choices, forced(num_tokens, top_k, num_experts).choices)
    assert (torch.bincount(choices.flatten(), minlength=num_experts) == rounds * top_k).all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "gshard_top2"])
def test_forced_weights_are_the_scores_of_those_experts(kind: str) -> None:
    logits = torch.randn(8, 4, requires_grad=True)
    routing = route(logits, Router(type=kind), 2, decision=forced(8, 2, 4))
    scores = torch.sigmoid(logits) if kind == "sigmoid" else torch.softmax(logits, 1)
    chosen = scores.gather(1, forced(8, 2, 4).choices)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(1, keepdim=True))
    routing.weights[:, 0].sum().backward()
    assert (logits.grad != 0).any(dim=1).all()
    assert sequence_balance(routing, None, 1).reported.item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "gshard_top2"])
def test_weights_against_numeric_gradients(kind: str) -> None:
    router = Router(type=kind, capacity_factor=None if kind == "gshard_top2" else 0.8)
    logits = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gshard = GShard(second_expert_policy="all")
    decision = route(logits, router, 2, gshard=gshard).decision
    assert not decision.kept.all()

    def weights(x: Tensor) -> Tensor:
        return route(x, router, 2, gshard=gshard, decision=decision).weights

    assert torch.autograd.gradcheck(weights, logits.requires_grad_())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "gshard_top2"])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_asks_the_device_for_a_number(kind: str, padded: bool) -> None:
    """Fake tensors hold no values: whatever would wait for the device raises."""
    router = Router(
        type=kind,
        aux_loss=0.01,
        correction_bias=kind == "sigmoid",
        capacity_factor=None if kind == "gshard_top2" else 1.0,
    )
    with FakeTensorMode():
        logits = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
        valid = torch.ones(16, dtype=torch.bool) if padded else None
        routing = route(
            logits,
            router,
            2,
            valid=valid,
            correction_bias=torch.zeros(8) if kind == "sigmoid" else None,
            gshard=GShard(second_expert_policy="random", batch_prioritized=True),
            generator=torch.Generator(),
        )
        balance = sequence_balance(routing, torch.arange(16) % 2, 2)
        (routing.weights.sum() + balance.loss + z_loss(logits, valid)).backward()
        counts = routing_counts(routing)
        assert (counts + counts).packed().shape == (3 * 8 + 6,)
        assert logits.grad.shape == (16, 8)
