"""Effective training time against a simulation, limits and published runs."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.simulator.failures import (
    Checkpoint,
    FailureRate,
    Recovery,
    best_interval_steps,
    checkpoint_of,
    daly_interval_s,
    exact_interval_s,
    failure_catalogue,
    failure_rate,
    fewest_steps,
    goodput,
    reliability,
    young_interval_s,
)

HOUR = 3600.0
TIMES = st.floats(0.01, 1e6)


def rate_of(mtbf_s: float, num_gpus: int = 512) -> FailureRate:
    return failure_rate(num_gpus, mtbf_s=mtbf_s)


def one_failure(
    draw: random.Random, mtbf_s: float, checkpoint: Checkpoint, recovery_s: float, tau_s: float
) -> tuple[float, float, float]:
    """From a recovery's end to the next: time, training that counts, running thrown away; by walking on."""
    fails_at = draw.expovariate(1 / mtbf_s)
    clock, begun, trained, kept = 0.0, [], 0.0, 0.0
    while clock + tau_s <= fails_at:
        trained += tau_s
        begun.append((clock + tau_s, trained))
        clock += tau_s + checkpoint.stall_s
    ran_for_kept = 0.0
    for start, amount in begun:
        if start + checkpoint.ready_s <= fails_at:
            kept, ran_for_kept = amount, start + checkpoint.stall_s
    recovering = 0.0
    while (quiet := draw.expovariate(1 / mtbf_s)) < recovery_s:
        recovering += quiet
    return fails_at + recovering + recovery_s, kept, fails_at - ran_for_kept


@pytest.mark.parametrize(
    ("mtbf_s", "stall_s", "ready_s", "recovery_s", "tau_s"),
    [
        (10_000, 30, 30, 300, 800),
        (2_000, 60, 60, 900, 500),
        (10_000, 2, 300, 300, 400),  # written beside training
        (900, 300, 300, 600, 549),  # Daly's figure 5
        (5_000, 10, 400, 0, 400),  # ready only when the next save begins
    ],
)
def test_the_closed_form_meets_a_simulation(
    mtbf_s: float, stall_s: float, ready_s: float, recovery_s: float, tau_s: float
) -> None:
    """Both are ratios of means over failures: tolerance is four standard errors of such a ratio."""
    draw = random.Random(7)
    checkpoint = Checkpoint(stall_s, ready_s)
    drawn = [one_failure(draw, mtbf_s, checkpoint, recovery_s, tau_s) for _ in range(40_000)]
    times, kept, lost = zip(*drawn, strict=True)
    expected = goodput(rate_of(mtbf_s), checkpoint, Recovery(load_s=recovery_s), tau_s, 1)
    ratio = sum(kept) / sum(times)
    residuals = [amount - ratio * time for amount, time in zip(kept, times, strict=True)]
    error = statistics.pstdev(residuals) / statistics.fmean(times) / math.sqrt(len(times))
    assert abs(ratio - expected.effective_fraction) < 4 * error
    assert error < 0.005, "a tolerance that says something"
    lost_error = statistics.pstdev(lost) / math.sqrt(len(lost))
    assert abs(statistics.fmean(lost) - expected.lost_work_s) < 4 * lost_error


@given(TIMES, st.floats(0, 1e5), st.floats(0, 1e5), TIMES, st.integers(1, 1000))
def test_shares_add_up(mtbf_s: float, stall_s: float, recovery_s: float, step_s: float, steps: int) -> None:
    found = goodput(rate_of(mtbf_s), Checkpoint(stall_s, stall_s), Recovery(recovery_s), step_s, steps)
    shares = (
        found.effective_fraction,
        found.saving_fraction,
        found.lost_fraction,
        found.recovery_fraction,
    )
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert min(shares) >= 0


def test_without_failures_only_saves_cost() -> None:
    never = failure_rate(512, per_gpu_hour=0)
    assert never.mtbf_s == math.inf
    found = goodput(never, checkpoint_of(stall_s=10), Recovery(600), 9.0, 10)
    assert found.effective_fraction == pytest.approx(0.9)
    assert found.lost_fraction == found.recovery_fraction == 0
    told = reliability(never, checkpoint_of(stall_s=10), Recovery(600), 9.0)
    assert told.best.interval_steps is None
    assert told.best.effective_fraction == 1
    assert told.young == told.daly == (math.inf, None)
    almost = goodput(rate_of(1e15), checkpoint_of(stall_s=10), Recovery(600), 9.0, 10)
    assert almost.effective_fraction == pytest.approx(found.effective_fraction, rel=1e-9)
    assert almost.lost_work_s == pytest.approx(found.lost_work_s, abs=2)  # of 1e15, as floats go


def test_free_saves_are_made_at_every_step() -> None:
    told = reliability(rate_of(10_000), checkpoint_of(stall_s=0), Recovery(), 5.0)
    assert told.best.interval_steps == 1
    assert told.young == told.daly == (0, 1)
    assert told.best.effective_fraction == pytest.approx(1, abs=3e-4)  # half a step in 10,000 s
    assert (
        reliability(failure_rate(8, per_gpu_hour=0), Checkpoint(0, 0), Recovery(), 5.0).best.interval_steps
        == 1
    )


@pytest.mark.parametrize(("mtbf_h", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_dalys_own_figures(mtbf_h: float, minutes: float) -> None:
    """Figures 3 to 5 of the paper: a dump of 5 min, and its optimum at three mean times to failure."""
    digits = 1 if minutes < 10 else 0
    assert round(daly_interval_s(300, mtbf_h * HOUR) / 60, digits) == minutes


def test_daly_is_next_to_the_exact_optimum() -> None:
    for stall_s in (0.001, 1, 30, 100, 499):
        young, daly, exact = (
            f(stall_s, 1000.0) for f in (young_interval_s, daly_interval_s, exact_interval_s)
        )

        def cost(tau_s: float, stall_s: float = stall_s) -> float:
            return math.expm1((tau_s + stall_s) / 1000) / tau_s

        assert cost(daly) / cost(exact) - 1 < 1e-4
        assert cost(exact) <= cost(daly) * (1 + 1e-12) <= cost(young) * (1 + 1e-11)
    assert daly_interval_s(2000, 1000) == 1000
    assert young_interval_s(30, 16 * HOUR) / 60 == pytest.approx(31, abs=0.1)


@given(TIMES, st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0.1, 100))
def test_no_whole_number_of_steps_is_better(
    mtbf_s: float, stall_s: float, behind_s: float, step_s: float
) -> None:
    rate, checkpoint = rate_of(mtbf_s), Checkpoint(stall_s, stall_s + behind_s)
    best = best_interval_steps(rate, checkpoint, step_s)
    assert best is not None

    def share(steps: int) -> float:
        return goodput(rate, checkpoint, Recovery(), step_s, steps).effective_fraction

    fewest = fewest_steps(checkpoint, step_s)
    others = {max(fewest, n) for n in (fewest, best // 2, best - 2, best - 1, best + 1, best + 2, 2 * best)}
    assert share(best) >= max(share(n) for n in others) * (1 - 1e-9)


def test_half_and_double_lie_around_the_choice() -> None:
    told = reliability(rate_of(20_000), checkpoint_of(stall_s=20), Recovery(300), 10.0)
    best = told.best.interval_steps
    assert best is not None
    assert told.chosen == told.best
    assert (told.half.interval_steps, told.double.interval_steps) == (best // 2, 2 * best)
    assert max(told.half.effective_fraction, told.double.effective_fraction) < told.best.effective_fraction
    assert told.half.effective_fraction == pytest.approx(told.double.effective_fraction, abs=0.002)
    asked = reliability(rate_of(20_000), checkpoint_of(stall_s=20), Recovery(300), 10.0, 400)
    assert asked.chosen.interval_steps == 400
    assert asked.best == told.best


def test_a_save_beside_training_costs_the_work_until_it_is_ready() -> None:
    rate = rate_of(20_000)
    at_once, later = (goodput(rate, Checkpoint(5, ready_s), Recovery(), 10.0, 50) for ready_s in (5, 205))
    assert later.lost_work_s - at_once.lost_work_s == pytest.approx(200, rel=0.05)
    assert later.effective_fraction == pytest.approx(at_once.effective_fraction * math.exp(-0.01))
    assert best_interval_steps(rate, Checkpoint(5, 5), 10.0) == best_interval_steps(
        rate, Checkpoint(5, 205), 10.0
    )


def test_what_a_save_costs() -> None:
    assert checkpoint_of(stall_s=3) == Checkpoint(3, 3)
    assert checkpoint_of(size_bytes=4e11, bandwidth_bytes_per_s=1e10) == Checkpoint(40, 40)
    assert checkpoint_of(stall_s=3, size_bytes=4e11, bandwidth_bytes_per_s=1e10) == Checkpoint(3, 40)
    assert fewest_steps(Checkpoint(3, 40), 10) == 4


def test_llama_3() -> None:
    """419 interruptions in 54 days on 16,384 GPUs: one in 3 h, and over 90 % effective training time.

    How long its saves and recoveries took is not published. With a stall of 10 s and 5 min to recover 90 % is
    kept; with a stall of a minute and half an hour to recover it could not have been.
    """
    rate = failure_rate(16_384, preset="llama-3-405b")
    assert rate.mtbf_s / HOUR == pytest.approx(54 * 24 / 419)
    assert rate.mtbf_s / HOUR == pytest.approx(3.1, abs=0.05)
    good = reliability(rate, checkpoint_of(stall_s=10), Recovery(60, 180, 60), 20.0).best
    assert 0.9 < good.effective_fraction < 0.95
    bad = reliability(rate, checkpoint_of(stall_s=60), Recovery(600, 600, 600), 20.0).best
    assert bad.effective_fraction < 0.8


@pytest.mark.parametrize(("num_gpus", "hours"), [(16_384, 1.8), (131_072, 0.23)])
def test_rsc_projections(num_gpus: int, hours: float) -> None:
    """arXiv:2410.21680 projects these from its rate by node."""
    assert failure_rate(num_gpus, preset="meta-rsc-1").mtbf_s / HOUR == pytest.approx(hours, rel=0.03)


def test_rsc_measured_more_failures_of_jobs_than_its_rate_by_node_gives() -> None:
    measured, by_node = (failure_rate(1024, preset=name) for name in ("meta-rsc-1024-gpus", "meta-rsc-1"))
    assert measured.mtbf_s / HOUR == pytest.approx(7.9)
    assert by_node.mtbf_s / measured.mtbf_s == pytest.approx(3.6, abs=0.1)


def test_512_gpus_keep_96_to_98_percent_at_the_worst_published_rate() -> None:
    rate = failure_rate(512, preset="meta-rsc-1024-gpus")
    assert rate.mtbf_s / HOUR == pytest.approx(15.8)
    told = reliability(rate, checkpoint_of(stall_s=30), Recovery(300), 10.0)
    assert 0.96 < told.best.effective_fraction < 0.98


def test_bloom_lost_half_of_three_hours() -> None:
    """The authors: a save every 3 h, 1.5 h lost on a crash."""
    found = goodput(failure_rate(384, preset="bloom-176b"), checkpoint_of(stall_s=40), Recovery(), 108.0, 100)
    assert found.lost_work_s / HOUR == pytest.approx(1.5, rel=0.02)


def test_every_rate_of_the_catalogue_has_a_source() -> None:
    catalogue = failure_catalogue()
    for preset in catalogue.rates.values():
        assert len(preset.source) > 20
        assert preset.counts
        assert preset.date.startswith("20")
        assert 1e-6 < preset.failures_per_gpu_s * HOUR < 1e-3
    assert catalogue.typical.recovery.value == 660
    assert catalogue.typical.repair.source.startswith("assumed:")


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "failure rate"),
        ({"per_gpu_hour": 1e-5, "preset": "llama-3-405b"}, "failure rate"),
        ({"per_gpu_hour": -1e-5}, "per_gpu_hour"),
        ({"per_gpu_hour": math.nan}, "per_gpu_hour"),
        ({"mtbf_s": 0}, "mtbf_s"),
        ({"mtbf_s": True}, "mtbf_s"),
        ({"preset": "llama-3"}, "preset"),
    ],
)
def test_impossible_rates(given: dict[str, object], key: str) -> None:
    with pytest.raises(InputError) as caught:
        failure_rate(512, **given)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_a_misspelt_preset_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match="nearest: llama-3-405b"):
        failure_rate(512, preset="llama3-405b")


def test_other_impossible_input() -> None:
    for wrong in (
        lambda: failure_rate(0, mtbf_s=1),
        lambda: checkpoint_of(),
        lambda: checkpoint_of(size_bytes=1e9),
        lambda: checkpoint_of(stall_s=-1),
        lambda: checkpoint_of(size_bytes=1e9, bandwidth_bytes_per_s=0),
        lambda: Checkpoint(10, 5),
        lambda: Recovery(detect_s=-1),
        lambda: FailureRate(8, 0, ""),
        lambda: goodput(rate_of(1000), Checkpoint(1, 1), Recovery(), 0, 1),
        lambda: goodput(rate_of(1000), Checkpoint(1, 1), Recovery(), 1, 0),
        lambda: goodput(rate_of(1000), Checkpoint(1, 1), Recovery(), 1, None),
        lambda: daly_interval_s(-1, 1000),
        lambda: young_interval_s(1, -1000),
    ):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="nearest: 10"):
        goodput(rate_of(1000), Checkpoint(1, 101), Recovery(), 10, 9)


def test_extremes_give_numbers() -> None:
    for mtbf_s in (1e-3, 1.0, 1e30):
        told = reliability(rate_of(mtbf_s), checkpoint_of(stall_s=100), Recovery(1e6), 1e-3)
        assert 0 <= told.half.effective_fraction <= told.best.effective_fraction <= 1
