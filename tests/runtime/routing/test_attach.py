"""A loss that enters through the weights: ordinary, split and recomputed backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from meshwright.model import Router
from meshwright.runtime.routing import Decision, GShard, attach, route, sequence_balance, z_loss

TOKENS, HIDDEN, EXPERTS = 16, 8, 4
ROUTERS = [Router(), Router(type="sigmoid"), Router(type="gshard_top2")]


class Layer(nn.Module):
    """A dense stand-in for an expert layer: every expert sees all tokens."""

    def __init__(self, router: Router, attached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(HIDDEN, HIDDEN)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN))
        self.router, self.attached = router, attached
        self.generator = torch.Generator().manual_seed(1)
        self.decision: Decision | None = None
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x))
        logits = self.gate(x)
        routing = route(
            logits, self.router, 2, gshard=GShard(), generator=self.generator, decision=self.decision
        )
        self.decision = routing.decision
        balance = sequence_balance(routing, torch.arange(TOKENS) % 2, 2)
        loss = 0.3 * balance.loss + 0.05 * z_loss(logits)
        self.losses.append(loss)
        weights = attach(routing.weights, loss) if self.attached else routing.weights
        dense = torch.zeros(TOKENS, EXPERTS).scatter(1, routing.choices, weights)
        return x + torch.einsum("te,th,ehg->tg", dense, x, self.experts)


def gradients_of_the_sum(router: Router) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What attaching must give: the loss added to the total in the open."""
    layer, x = Layer(router, attached=False), tokens()
    out = layer(x)
    (out.square().sum() + layer.losses[0]).backward()
    return out.detach(), {name: p.grad for name, p in layer.named_parameters()}, x.grad


def tokens() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()


def assert_same(layer: Layer, expected: dict[str, Tensor]) -> None:
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r.type)
def test_backward_through_the_weights_alone(router: Router) -> None:
    out, expected, expected_input = gradients_of_the_sum(router)
    layer, x = Layer(router, attached=True), tokens()
    attached = layer(x)
    assert torch.equal(attached, out)
    attached.square().sum().backward()
    assert_same(layer, expected)
    torch.testing.assert_close(x.grad, expected_input, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r.type)
def test_input_and_weight_gradients_apart(router: Router) -> None:
    """As zero-bubble schedules do: first the input's gradient, later the parameters'."""
    _, expected, expected_input = gradients_of_the_sum(router)
    layer, x = Layer(router, attached=True), tokens()
    total = layer(x).square().sum()
    (gradient,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(gradient, expected_input, rtol=1e-5, atol=1e-6)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    for name, value in zip(names, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r.type)
def test_split_as_torch_pipelining_splits(router: Router) -> None:
    _, expected, expected_input = gradients_of_the_sum(router)
    layer, x = Layer(router, attached=True), tokens()
    out = layer(x)
    grads, groups = stage_backward_input([out], [2 * out.detach()], [x], iter(layer.parameters()))
    torch.testing.assert_close(grads[0], expected_input, rtol=1e-5, atol=1e-6)
    stage_backward_weight(iter(layer.parameters()), groups)
    assert_same(layer, expected)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: r.type)
def test_recomputed_without_counting_twice(router: Router) -> None:
    _, expected, expected_input = gradients_of_the_sum(router)
    layer, x = Layer(router, attached=True), tokens()
    out = checkpoint(layer, x, use_reentrant=False)
    first = layer.decision
    out.square().sum().backward()
    assert len(layer.losses) == 2  # it did run twice
    assert layer.decision is first
    assert_same(layer, expected)
    torch.testing.assert_close(x.grad, expected_input, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_loss_is_one_whatever_comes_back() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    loss = torch.zeros((), dtype=torch.float64, requires_grad=True)
    attached = attach(weights, loss)
    assert torch.equal(attached, weights)
    (1024.0 * attached.sum()).backward()
    assert loss.grad.item() == 1.0
    assert loss.grad.dtype == torch.float64
    assert torch.equal(weights.grad, torch.full((3, 2), 1024.0))


def test_a_loss_without_gradient_is_left_alone() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    attach(weights, torch.tensor(1.0)).sum().backward()
    assert torch.equal(weights.grad, torch.ones(3, 2))
