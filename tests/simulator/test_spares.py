"""Spare nodes against the Poisson distribution, a simulation and limits."""

from __future__ import annotations

import heapq
import math
import random
import statistics

import pytest

from meshwright.errors import InputError
from meshwright.simulator.failures import failure_rate
from meshwright.simulator.spares import erlang_b, shortage, spare_nodes

HOUR = 3600.0


@pytest.mark.parametrize("load", [0.1, 1, 7.5, 40])
@pytest.mark.parametrize("servers", [0, 1, 5, 50])
def test_erlang_b_is_the_last_term_of_a_cut_poisson(load: float, servers: int) -> None:
    terms = [math.exp(k * math.log(load) - math.lgamma(k + 1)) for k in range(servers + 1)]
    assert erlang_b(servers, load) == pytest.approx(terms[-1] / sum(terms), rel=1e-9)


def walked(seed: int, mtbf_s: float, repair_s: float, spares: int, fixed: bool) -> tuple[float, float]:
    """Failures that find no spare, and time waited, of a job walked through 20,000 failures."""
    draw = random.Random(seed)
    repairs: list[float] = []
    clock = waited = 0.0
    short = 0
    for _ in range(20_000):
        clock += draw.expovariate(1 / mtbf_s)
        while repairs and repairs[0] <= clock:
            heapq.heappop(repairs)
        heapq.heappush(repairs, clock + (repair_s if fixed else draw.expovariate(1 / repair_s)))
        if len(repairs) > spares:
            short += 1
            back = heapq.heappop(repairs)
            waited, clock = waited + back - clock, back
    return short / 20_000, waited / clock


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(("repair_s", "spares"), [(5000, 0), (20_000, 2), (50_000, 6)])
def test_shortage_meets_a_simulation(repair_s: float, spares: int, fixed: bool) -> None:
    """Of repairs only the mean matters. Tolerance: four standard errors over 12 runs."""
    mtbf_s = 10_000.0
    runs = [walked(seed, mtbf_s, repair_s, spares, fixed) for seed in range(12)]
    expected = shortage(failure_rate(512, mtbf_s=mtbf_s), repair_s, spares)
    for drawn, closed in zip(
        zip(*runs, strict=True), (expected.short_fraction, expected.waiting_fraction), strict=True
    ):
        error = statistics.stdev(drawn) / math.sqrt(len(drawn))
        assert abs(statistics.fmean(drawn) - closed) <= 4 * error + 1e-12
        assert error < 0.002, "a tolerance that says something"


def test_the_fewest_spares_are_enough_and_one_less_is_not() -> None:
    rate = failure_rate(16_384, preset="llama-3-405b")
    told = spare_nodes(rate, 48 * HOUR, replaced_fraction=0.78)
    assert told.num_nodes == 2048
    assert told.in_repair_nodes == pytest.approx(0.78 * 419 * 2 / 54)
    assert told.enough.short_fraction <= 0.01
    fewer = shortage(rate, 48 * HOUR, told.enough.num_spares - 1, replaced_fraction=0.78)
    assert fewer.short_fraction > 0.01
    assert told.enough.wait_s == 48 * HOUR / (told.enough.num_spares + 1)
    assert told.none.short_fraction == 1
    assert told.none.waiting_fraction == pytest.approx(told.in_repair_nodes / (1 + told.in_repair_nodes))


def test_bloom_had_as_many_as_were_needed() -> None:
    """BLOOM kept 4 nodes spare for 48 (arXiv:2211.05100): enough for repairs of three days."""
    told = spare_nodes(failure_rate(384, preset="bloom-176b"), 72 * HOUR)
    assert told.enough.num_spares == 4


def test_without_failures_none_are_needed() -> None:
    for rate, share in ((failure_rate(64, per_gpu_hour=0), 1.0), (failure_rate(64, mtbf_s=1e5), 0.0)):
        told = spare_nodes(rate, 1e5, replaced_fraction=share)
        assert told.enough == told.none
        assert (told.enough.num_spares, told.enough.short_fraction, told.enough.waiting_fraction) == (0, 0, 0)


def test_impossible_input() -> None:
    rate = failure_rate(64, mtbf_s=1000)
    for wrong in (
        lambda: spare_nodes(rate, -1),
        lambda: spare_nodes(rate, 10, probability_fraction=1),
        lambda: spare_nodes(rate, 10, probability_fraction=math.nan),
        lambda: spare_nodes(rate, 10, replaced_fraction=1.1),
        lambda: spare_nodes(rate, 10, gpus_per_node=0),
        lambda: shortage(rate, 10, -1),
        lambda: erlang_b(2, -1),
    ):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match=r"repair_s.*job's 8 .*nearest: 8000"):
        spare_nodes(rate, 8001)
