"""fairscale's Top2Gate, rebuilt from choices, kept copies and weights."""

from __future__ import annotations

import pytest
import torch
from fairscale.nn.moe.top2gate import Top2Gate, top2gating
from torch import Tensor

from meshwright.model import Router
from meshwright.runtime.routing import GShard, Routing, gshard_balance, route

FAIRSCALE = GShard(variant="fairscale")
ROUTER = Router(type="gshard_top2")


def slots(routing: Routing, capacity: int) -> Tensor:
    """The dense combine weights [S, E, C]: a copy's slot is its place among all that asked at its expert,
    first choices first."""
    num_tokens, num_experts = routing.scores.shape
    experts = routing.choices.t().flatten()
    asked = torch.nn.functional.one_hot(experts, num_experts)
    place = (asked.cumsum(0) - asked).gather(1, experts[:, None]).squeeze(1).view(2, num_tokens).t()
    combine = torch.zeros(num_tokens, num_experts, capacity)
    assert routing.kept is not None
    token, choice = routing.kept.nonzero(as_tuple=True)
    index = (token, routing.choices[token, choice], place[token, choice])
    return combine.index_put(index, routing.weights[token, choice])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "skew"), [(64, 8, 0.0), (64, 8, 3.0), (32, 4, 1.0), (16, 16, 5.0)]
)
def test_top2gate_bit_for_bit(num_tokens: int, num_experts: int, skew: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    logits = logits + skew * torch.linspace(0, 1, num_experts)
    torch.manual_seed(11)
    theirs = logits.clone().requires_grad_()
    l_aux, combine, mask = top2gating(theirs)

    ours = logits.clone().requires_grad_()
    routing = route(ours, ROUTER, 2, gshard=FAIRSCALE, generator=torch.Generator().manual_seed(11))
    rebuilt = slots(routing, 2 * num_tokens // num_experts)
    assert torch.equal(rebuilt, combine)
    assert torch.equal(rebuilt.bool(), mask)
    balance = gshard_balance(routing, FAIRSCALE)
    torch.testing.assert_close(balance.loss, l_aux, rtol=1e-6, atol=0)
    torch.testing.assert_close(balance.reported, l_aux.detach(), rtol=1e-6, atol=0)

    pull = torch.randn(combine.shape, generator=generator)
    ((combine * pull).sum() + l_aux).backward()
    ((rebuilt * pull).sum() + balance.loss).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_top2gate_as_a_module() -> None:
    torch.manual_seed(0)
    gate = Top2Gate(16, 8)
    x = torch.randn(64, 16)
    torch.manual_seed(3)
    _, combine, _ = gate(x)
    with torch.no_grad():
        logits = gate.wg(x)
    routing = route(logits, ROUTER, 2, gshard=FAIRSCALE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(slots(routing, 16), combine)
    assert not routing.kept.all()  # the case tells dropping from not dropping


def test_a_draw_needs_a_generator() -> None:
    with pytest.raises(ValueError, match="give route a generator"):
        route(torch.randn(8, 4), ROUTER, 2)
