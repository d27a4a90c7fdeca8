"""Who is chosen in a dry run: exactly evenly, or as a histogram of the workload says; the first of the seams.

Shape letters: T tokens of this rank, k choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from meshwright.plan import Plan
from meshwright.runtime.routing import Decision, forced
from meshwright.workload import RoutingCounts


class Routes(Protocol):
    """A rule by which every rank's choices are known to all."""

    rule: tuple[Any, ...]
    differs_by_layer: bool

    def alike(self, num_tokens: int, place: int) -> int:
        """The first place along ep whose rank chooses as the one at this place does."""

    def decision(self, num_tokens: int, layer: int, place: int, device: torch.device) -> Decision:
        """What the rank at a place along ep chooses for its tokens in a layer."""

    def choices_of(self, own_Tk: Tensor, place: int) -> Tensor:
        """What the rank at a place chooses where a rank's own choices, or those of its place 0, are these."""

    def counts_of(self, own_E: Tensor, place: int) -> Tensor:
        """How many copies each expert gets of the rank at a place, where a rank's own counts are these."""


class Even:
    """The same number of tokens to every expert, as training does with `routes_evenly`."""

    def __init__(self, plan: Plan) -> None:
        self.top_k, self.num_experts = plan.model.num_experts_per_tok, plan.model.num_experts
        self.rule, self.differs_by_layer = ("even", self.top_k, self.num_experts), False

    def alike(self, num_tokens: int, place: int) -> int:
        """By the rule, choices begin at place·T·k mod E."""
        return place if num_tokens * self.top_k % self.num_experts else 0

    def decision(self, num_tokens: int, layer: int, place: int, device: torch.device) -> Decision:
        """Choice j of token t is ((place·T + t)·k + j) mod E."""
        first = place * num_tokens
        return forced(num_tokens, self.top_k, self.num_experts, first_token=first, device=device)

    def choices_of(self, own_Tk: Tensor, place: int) -> Tensor:
        """By the rule itself."""
        return self.decision(own_Tk.shape[0], 0, place, own_Tk.device).choices

    def counts_of(self, own_E: Tensor, place: int) -> Tensor:
        """By the rule itself."""
        tokens = int(own_E.sum()) // self.top_k
        choices = self.decision(tokens, 0, place, own_E.device).choices
        return torch.bincount(choices.flatten(), minlength=self.num_experts)


class Histogram:
    """Every rank's tokens spread over a layer's experts as the workload counted them."""

    def __init__(self, plan: Plan, counts: RoutingCounts) -> None:
        self.top_k, self.num_experts = plan.model.num_experts_per_tok, plan.model.num_experts
        self.rule, self.differs_by_layer = ("histogram", self.top_k, counts.tokens), True
        self.by_layer: dict[int, list[int]] = {}
        for layer, expert, tokens in counts.tokens:
            self.by_layer.setdefault(layer, [0] * self.num_experts)[expert] += tokens
        self.mean = [sum(column) for column in zip(*self.by_layer.values(), strict=True)]

    def alike(self, num_tokens: int, place: int) -> int:
        """All ranks choose alike."""
        return 0

    def decision(self, num_tokens: int, layer: int, place: int, device: torch.device) -> Decision:
        """Experts in order, each as often as its share says, dealt out so that no token gets one twice."""
        quotas = shared_out(self.by_layer.get(layer, self.mean), num_tokens, self.top_k)
        experts = torch.arange(self.num_experts, device=device)
        copies = experts.repeat_interleave(torch.tensor(quotas, device=device))
        return Decision(copies.view(self.top_k, num_tokens).t().contiguous())

    def choices_of(self, own_Tk: Tensor, place: int) -> Tensor:
        """All ranks choose alike."""
        return own_Tk

    def counts_of(self, own_E: Tensor, place: int) -> Tensor:
        """All ranks choose alike."""
        return own_E


def shared_out(weights: list[int], num_tokens: int, top_k: int) -> list[int]:
    """T·k copies over experts in proportion to their weights, none with more than T: largest remainders
    first (Hamilton's method), and what goes beyond T to the next in order."""
    total, copies = sum(weights) or 1, num_tokens * top_k
    exact = [weight * copies / total for weight in weights]
    given = [min(int(share), num_tokens) for share in exact]
    order = sorted(range(len(weights)), key=lambda e: given[e] - exact[e])
    place = 0
    while (left := copies - sum(given)) > 0:
        expert = order[place % len(order)]
        more = 1 if place < len(order) else left
        given[expert] += min(more, num_tokens - given[expert])
        place += 1
    return given


def routes_of(plan: Plan) -> Routes:
    """How a plan's dry run routes: by a histogram where the workload gives one, else evenly."""
    routing: object = plan.workload.routing
    return Histogram(plan, routing) if isinstance(routing, RoutingCounts) else Even(plan)


def description(routing: object) -> Mapping[str, str]:
    """What is said of the routing."""
    if isinstance(routing, RoutingCounts):
        return {"routing": "by the workload's histogram, the same on every rank"}
    if routing == "balanced":
        return {"routing": "exactly balanced"}
    return {"routing": "exactly balanced: the workload's spread is random, and no histogram"}
