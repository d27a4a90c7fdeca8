"""Losses: their closed forms, their gradients, and that a split over ranks changes neither."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from meshwright.model import Router
from meshwright.runtime.routing import (
    Balance,
    GShard,
    Routing,
    batch_balance,
    gshard_balance,
    route,
    sequence_balance,
    updated_bias,
    z_loss,
)

FAIRSEQ = GShard()
LOSSES: dict[str, Callable[..., Balance]] = {
    "sequence": lambda r, s, n, add: sequence_balance(r, s, n, add),
    "batch": lambda r, s, n, add: batch_balance(r, add),
    "gshard": lambda r, s, n, add: gshard_balance(r, FAIRSEQ, add),
}


def written_out(routing: Routing, sequence: Tensor, num_sequences: int, counted: Tensor) -> float:
    """Equations 17 to 20 of DeepSeek-V3, sequence by sequence and expert by expert."""
    p = routing.scores / routing.scores.sum(1, keepdim=True)
    num_experts, top_k, total = routing.num_experts, counted.shape[1], 0.0
    valid = torch.ones(len(p), dtype=torch.bool) if routing.valid is None else routing.valid
    for s in range(num_sequences):
        tokens = ((sequence == s) & valid).nonzero().flatten().tolist()
        for i in range(num_experts):
            f = sum(i in counted[t].tolist() for t in tokens) * num_experts / (top_k * len(tokens))
            total += f * sum(float(p[t, i]) for t in tokens) / len(tokens)
    return total


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_sequence_balance_is_the_paper_s(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 6, generator=generator)
    valid = torch.rand(30, generator=generator) < 0.8
    routing = route(logits, Router(type=kind), 2, valid=valid)
    sequence = torch.arange(30) // 10
    balance = sequence_balance(routing, sequence, 3)
    expected = written_out(routing, sequence, 3, routing.choices)
    assert balance.loss.item() == pytest.approx(expected, rel=1e-6)
    assert balance.reported.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "router",
    [
        Router(type="sigmoid", correction_bias=True, aux_loss=0.01),
        Router(type="sigmoid", num_groups=3, num_limited_groups=1, aux_loss=0.01),
    ],
)
def test_the_loss_knows_neither_correction_bias_nor_groups(router: Router) -> None:
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    bias = torch.tensor([3.0, 0, 0, 0, 0, 0]) if router.correction_bias else None
    routing = route(logits, router, 2, correction_bias=bias)
    best = logits.topk(2).indices
    assert not torch.equal(routing.choices, best)
    zeros = torch.zeros(30, dtype=torch.int64)
    expected = written_out(routing, zeros, 1, best)
    assert sequence_balance(routing, None, 1).reported.item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    kind=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 10_000),
    num_ranks=st.integers(1, 4),
    padded=st.booleans(),
)
def test_a_split_over_ranks_changes_nothing(
    name: str, kind: str, seed: int, num_ranks: int, padded: bool
) -> None:
    """Every rank contributes its sums first, as an all-reduce does; each then has its share of the loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(24, 6, generator=generator)
    valid = torch.rand(24, generator=generator) < 0.8 if padded else None
    sequence = torch.randint(0, 3, (24,), generator=generator)
    owner = torch.randint(0, num_ranks, (24,), generator=generator)
    router = Router(type=kind)

    def share(add: Callable[[Tensor], Tensor], mine: Tensor, x: Tensor) -> Balance:
        routing = route(x[mine], router, 2, valid=None if valid is None else valid[mine])
        return LOSSES[name](routing, sequence[mine], 3, add)

    whole = logits.clone().requires_grad_()
    expected = share(lambda sums: sums, torch.arange(24), whole)
    expected.loss.backward()

    contributions: list[Tensor] = []
    members = [(owner == rank).nonzero().flatten() for rank in range(num_ranks)]
    for mine in members:
        share(lambda sums: contributions.append(sums) or sums, mine, logits)
    assert len(contributions) == num_ranks  # once per call
    total = torch.stack(contributions).sum(0)
    assert total.dtype == torch.float32
    assert total.shape == ((6, 6) if name == "sequence" else (2, 6))

    split = logits.clone().requires_grad_()
    shares = [share(lambda sums: sums.copy_(total), mine, split) for mine in members]
    sum(balance.loss for balance in shares).backward()
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(sum(b.loss.detach() for b in shares), expected.reported, rtol=1e-6, atol=0)
    for balance in shares:
        torch.testing.assert_close(balance.reported, expected.reported, rtol=1e-6, atol=0)
        assert not balance.reported.requires_grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_numeric_gradients(name: str, kind: str) -> None:
    """Counts are constants, so the choice is held while logits move."""
    logits = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sequence = torch.arange(12) % 2
    decision = route(logits, Router(type=kind), 2).decision

    def loss(x: Tensor) -> Tensor:
        routing = route(x, Router(type=kind), 2, decision=decision)
        return LOSSES[name](routing, sequence, 2, lambda sums: sums).loss

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    valid = torch.arange(12) < 9
    assert torch.autograd.gradcheck(lambda x: z_loss(x, valid), logits)


def test_sums_given_back_replace_counting_and_communication() -> None:
    logits = torch.randn(12, 4)
    routing = route(logits, Router(), 2)
    first = sequence_balance(routing, None, 1)

    def refuse(sums: Tensor) -> Tensor:
        raise AssertionError("communicated again")

    again = sequence_balance(routing, None, 1, refuse, sums=first.sums)
    assert torch.equal(again.loss, first.loss)


def test_uniform_probabilities_give_one_per_sequence() -> None:
    routing = route(torch.zeros(12, 4), Router(), 2)
    assert sequence_balance(routing, torch.arange(12) % 3, 3).reported.item() == pytest.approx(3.0)
    assert batch_balance(routing).reported.item() == pytest.approx(1.0)


def test_correction_bias_moves_by_rate_towards_the_mean() -> None:
    bias = torch.tensor([0.5, -0.5, 0.0, 0.0])
    counts = torch.tensor([10, 2, 4, 4])
    assert torch.equal(updated_bias(bias, counts, 0.25), torch.tensor([0.25, -0.25, 0.25, 0.25]))
    recentred = updated_bias(bias, counts, 0.25, recentre=True)
    assert recentred.sum().item() == pytest.approx(bias.sum().item())
    layers = updated_bias(torch.zeros(2, 4), torch.stack((counts, counts.flip(0))), 1.0)
    assert layers.tolist() == [[-1, 1, 1, 1], [1, 1, 1, -1]]


def test_correction_bias_is_exact_where_fp32_is_not() -> None:
    """Two experts one copy apart at 2³⁰ each: FP32 would round both to the mean."""
    counts = torch.tensor([2**30, 2**30 + 1])
    assert updated_bias(torch.zeros(2), counts, 1.0).tolist() == [1.0, -1.0]
    with pytest.raises(TypeError, match="exact integers"):
        updated_bias(torch.zeros(2), counts.float(), 1.0)
