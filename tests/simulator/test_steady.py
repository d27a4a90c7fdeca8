"""Long steps by their steady state, against every micro-batch run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulator.plans import example, plan

from meshwright.errors import InputError
from meshwright.ir.program import Program
from meshwright.simulator import steady
from meshwright.simulator.draws import Spread
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import Kept, simulate
from meshwright.simulator.steady import Totals, totals

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def assert_as_run_whole(found: Totals, asked: object, options: Options) -> None:
    expected = simulate(asked, options)  # type: ignore[arg-type]
    assert found.step_time_s == pytest.approx(expected.step_time_s, rel=1e-9)
    assert found.bubble_fraction == pytest.approx(expected.bubble_fraction, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [9, 16, 33, 40])
def test_every_schedule_and_count(schedule: str, count: int) -> None:
    ranks = 4
    chunks = 1 if schedule in ("GPipe", "1F1B") else 2
    count = count if chunks == 1 or "V" in schedule else count // ranks * ranks
    asked = plan(
        {"pp": ranks, "vpp": chunks, "ep": 4}, {"schedule": schedule}, {"global_batch_size": 4 * count}
    )
    assert_as_run_whole(totals(asked), asked, Options())


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble", "1F1B"])
@pytest.mark.parametrize("count", [54, 63])
def test_rounds_longer_than_the_pipeline(schedule: str, count: int) -> None:
    """54 micro-batches over eight ranks are six rounds of nine: fewer of them must be rounds of nine too."""
    chunks = 1 if schedule == "1F1B" else 2
    layout = {"pp": 8, "vpp": chunks, "dp": 2, "ep": 2}
    asked = plan(layout, {"schedule": schedule, "engine": "torchtitan"}, {"global_batch_size": 2 * count})
    assert_as_run_whole(totals(asked), asked, Options())


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["deepseek-v3-2048", "mixtral-8x22b-128", "brief-30b"]), st.booleans(), st.booleans())
def test_examples_of_every_size(name: str, contention: bool, sends: bool) -> None:
    options = Options(contention=contention, point_to_point=sends)
    asked = example(name)
    assert_as_run_whole(totals(asked, options), asked, options)


def test_what_is_not_steady_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where repetitions differ more micro-batches run, in the end all; the same figures come out."""
    asked = example("deepseek-v3-2048")
    short = totals(asked)
    ran: list[int] = []
    run_all = steady.run_all

    def counted(program: Program, options: Options, samples: int) -> Kept:
        ran.append(program.plan.num_micro_batches)
        return run_all(program, options, samples)

    monkeypatch.setattr(steady, "run_all", counted)
    monkeypatch.setattr(steady, "_further_s", lambda run, order: None)
    whole = totals(asked)
    assert ran == sorted(ran)
    assert ran[0] < ran[-1] == asked.num_micro_batches
    assert whole.step_time_s == pytest.approx(short.step_time_s, rel=1e-9)


def test_drawn_micro_batches_are_refused() -> None:
    with pytest.raises(InputError, match="has to be run"):
        totals(example("brief-30b"), Options(stragglers=Spread(0.1)))
