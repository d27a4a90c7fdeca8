"""Counts that add up, and the figures read from them."""

from __future__ import annotations

import math

import pytest
import torch

from meshwright.model import Router
from meshwright.runtime.routing import GShard, RoutingCounts, forced, route, routing_counts, routing_log

LOGITS = torch.randn(40, 10, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 10)


def counts_of(tokens: slice, router: Router | None = None, top_k: int = 3) -> RoutingCounts:
    return routing_counts(route(LOGITS[tokens], router or Router(), top_k))


def test_parts_add_up_to_the_whole_and_pack_exactly() -> None:
    whole = counts_of(slice(None)).packed()
    parts = counts_of(slice(0, 13)) + counts_of(slice(13, 40))
    torch.testing.assert_close(parts.packed(), whole, rtol=1e-12, atol=0)
    back = RoutingCounts.unpacked(whole)
    assert torch.equal(back.packed(), whole)
    assert back.offered.dtype == torch.int64
    assert torch.equal(back.offered, counts_of(slice(None)).offered)


def test_counts_are_those_of_the_choices() -> None:
    routing = route(LOGITS, Router(capacity_factor=0.8), 3)
    counts = routing_counts(routing)
    assert torch.equal(counts.first, torch.bincount(routing.choices[:, 0], minlength=10))
    assert torch.equal(counts.second, torch.bincount(routing.choices[:, 1], minlength=10))
    assert torch.equal(counts.offered, torch.bincount(routing.choices.flatten(), minlength=10))
    dropped = (~routing.kept).sum(0)
    assert [int(counts.dropped_first), int(counts.dropped_second)] == dropped[:2].tolist()
    assert int(counts.dropped) == int(dropped.sum()) > 0
    log = routing_log(counts)
    assert log["dropped_fraction"].item() == pytest.approx(int(dropped.sum()) / 120)
    assert log["overflow_expert2"].item() == pytest.approx(100 * int(dropped[1]) / 40)


def test_balanced_routing() -> None:
    log = routing_log(routing_counts(route(torch.zeros(40, 10), Router(), 2, decision=forced(40, 2, 10))))
    assert log["load_max_over_mean"].item() == 1.0
    assert log["dropped_fraction"].item() == 0.0
    assert log["entropy_gating"].item() == pytest.approx(math.log(10))
    # First choices are the even experts alone: two of them are the top fifth, two odd ones the bottom fifth.
    assert log["expert1_balance_top"].item() == pytest.approx(40.0)
    assert log["expert1_balance_bottom"].item() == 0.0
    assert log["unused_expert1_count"].item() == 5


def test_one_choice_has_no_second() -> None:
    log = routing_log(counts_of(slice(None), top_k=1))
    assert log["unused_expert2_count"].item() == 10
    assert log["overflow_expert2"].item() == log["expert2_balance_top"].item() == 0.0


def test_layers_are_read_at_once() -> None:
    layers = [counts_of(slice(None)), counts_of(slice(0, 20))]
    packed = torch.stack([layer.packed() for layer in layers])
    together = routing_log(RoutingCounts.unpacked(packed))
    for number, layer in enumerate(layers):
        for key, value in routing_log(layer).items():
            torch.testing.assert_close(together[key][number], value)


def test_second_experts_passed_over_are_not_dropped() -> None:
    gshard = GShard(second_expert_policy="random")
    generator = torch.Generator().manual_seed(1)
    routing = route(LOGITS, Router(type="gshard_top2"), 2, gshard=gshard, generator=generator)
    counts = routing_counts(routing)
    asked = routing.decision.offered
    assert 0 < int(counts.offered_second) == int(asked[:, 1].sum()) < 40
    assert int(counts.dropped) == int((asked & ~routing.kept).sum())
    assert int(counts.second.sum()) == 40
