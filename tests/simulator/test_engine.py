"""Pipelines run event by event: bounds that no order can beat, the estimate, and what papers state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulator.pipelines import NAMES, SECONDS, B, F, I, Pipeline, W, by_stage, pipelines, uniform

from meshwright.ir.schedule import Action, build_schedule, run_in_order
from meshwright.planner.pipeline import pipeline_time
from meshwright.policy import ScheduleName
from meshwright.simulator import engine
from meshwright.simulator.engine import Beside, Run, Send, Work, lines_of, run
from meshwright.simulator.streams import Flow, Stretch


def dependencies_s(pipeline: Pipeline) -> float:
    """The longest chain of one micro-batch: forwards up the stages, gradients back down, sends between. Full
    backwards hold the gradient back until their weight gradient is done."""
    work, longest = pipeline.work, 0.0
    full = {
        (part.stage, part.micro_batch)
        for rank in range(pipeline.schedule.num_ranks)
        for action in pipeline.schedule.actions(rank)
        for part in action.simple_actions
        if part.kind is B
    }
    for micro_batch in range(pipeline.schedule.num_micro_batches):
        chain = 0.0
        for stage in range(pipeline.schedule.num_stages):
            chain += work.seconds[F][stage][micro_batch] + work.seconds[I][stage][micro_batch]
            if (stage, micro_batch) in full:
                chain += work.seconds[W][stage][micro_batch]
            for kind in (F, I):
                send = work.sends[kind][stage] if work.sends else None
                chain += send.shown_s + send.hidden_s if send else 0.0
        longest = max(longest, chain)
    return longest


@settings(max_examples=150, deadline=None)
@given(pipelines())
def test_no_run_beats_its_dependencies_or_any_ranks_work(pipeline: Pipeline) -> None:
    found = run(pipeline.schedule, pipeline.work)
    slack = 1 + 1e-12
    assert found.total_s * slack >= dependencies_s(pipeline)
    for rank in range(pipeline.schedule.num_ranks):
        work = sum(pipeline.seconds(a) + pipeline.shown(a) for a in pipeline.schedule.actions(rank))
        assert found.busy_s(rank) == pytest.approx(work, rel=1e-9)
        assert found.total_s * slack >= work


@settings(max_examples=150, deadline=None)
@given(pipelines())
def test_a_run_keeps_every_order_and_waits_for_nothing_but_its_inputs(pipeline: Pipeline) -> None:
    """Every action stands in its rank's order, and starts at the very moment at which the rank is free or the
    input that it names as its cause arrives."""
    found = run(pipeline.schedule, pipeline.work)
    for rank, all_done in enumerate(found.done):
        assert [done.action for done in all_done] == list(pipeline.schedule.actions(rank))
        free = 0.0
        for done in all_done:
            waited_for = free if done.cause < 0 else found.arrived_s[done.cause]
            assert done.start_s == waited_for >= free
            free = done.end_s


@settings(max_examples=100, deadline=None)
@given(pipelines())
def test_without_sends_it_is_the_order_run_action_by_action(pipeline: Pipeline) -> None:
    alone = Pipeline(pipeline.schedule, replace(pipeline.work, sends={}))
    expected = run_in_order(alone.schedule, alone.seconds)
    found = run(alone.schedule, alone.work)
    for spans, all_done in zip(expected, found.done, strict=True):
        assert [(done.start_s, done.end_s) for done in all_done] == [pytest.approx(s) for s in spans]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 4), st.data())
def test_it_is_what_the_estimate_says_for_any_stages(
    name: ScheduleName, ranks: int, rounds: int, data: st.DataObject
) -> None:
    """The estimate runs orders by arrays and goes on from a few rounds; events are run one by one."""
    chunks, count = (1 if name in ("GPipe", "1F1B") else 2), ranks * rounds
    count = max(count, 2 * ranks) if name == "DualPipeV" else count
    row = st.lists(SECONDS, min_size=ranks * chunks, max_size=ranks * chunks)
    stages = [data.draw(row) for _ in range(3)]
    found = run(build_schedule(name, ranks, count, chunks), by_stage(stages, count))
    expected = pipeline_time(name, ranks, chunks, count, np.array(stages)[..., None])
    ends = [done[-1].end_s for done in found.done]
    assert ends == pytest.approx(expected.ends_s[:, 0].tolist(), rel=1e-9)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), SECONDS, SECONDS, SECONDS)
def test_1f1b_fills_and_drains_once(ranks: int, count: int, f: float, i: float, w: float) -> None:
    """(m + P − 1)(F + B) for equal stages (arXiv:2104.04473 §2.2.1), with fewer micro-batches than ranks
    too."""
    schedule = build_schedule("1F1B", ranks, count)
    found = run(schedule, uniform(schedule, f, i, w))
    assert found.total_s == pytest.approx((count + ranks - 1) * (f + i + w), rel=1e-9)


def idle_s(found: Run, rank: int) -> float:
    return found.total_s - found.busy_s(rank)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (1, 1.5, 0.5), (2, 2, 1)])
def test_zb_h1_idles_as_its_paper_states(ranks: int, f: float, i: float, w: float) -> None:
    """(P − 1)(F + I − W) on every rank (ZB-H1, arXiv:2401.10241 §2.3), where W is not longer than F and I."""
    schedule = build_schedule("InterleavedZeroBubble", ranks, 3 * ranks, 1)
    found = run(schedule, uniform(schedule, f, i, w))
    for rank in range(ranks):
        assert idle_s(found, rank) == pytest.approx((ranks - 1) * (f + i - w))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zbv_fills_every_gap_with_unit_times(ranks: int) -> None:
    """ZB-V has no bubble where F, I and W take the same time: each rank works without a gap from its first
    action to its last (arXiv:2401.10241 §6)."""
    schedule = build_schedule("ZBVZeroBubble", ranks, 2 * ranks)
    found = run(schedule, uniform(schedule, 1, 1, 1))
    for done in found.done:
        assert done[-1].end_s - done[0].start_s == pytest.approx(6 * schedule.num_micro_batches)
    assert found.total_s == pytest.approx(6 * schedule.num_micro_batches + ranks - 1)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dual_pipe_v_idles_as_its_authors_state(ranks: int) -> None:
    """(P − 1)(F&B + B − 3W) with P ranks of two stages each, half of DualPipe's PP (deepseek-ai/DualPipe,
    README): with F = I = W = 1, B = 2 and F&B = 3 unhidden, 2(P − 1)."""
    schedule = build_schedule("DualPipeV", ranks, 4 * ranks)
    found = run(schedule, uniform(schedule, 1, 1, 1))
    assert max(idle_s(found, rank) for rank in range(ranks)) == pytest.approx(2 * (ranks - 1))


@pytest.mark.parametrize("name", NAMES)
def test_slower_actions_and_sends_never_end_earlier(name: ScheduleName) -> None:
    schedule = build_schedule(name, 4, 8)
    base = uniform(schedule, 1, 1, 1)
    stages = range(schedule.num_stages)
    sends: list[Send | None] = [Send(0.1, 0.1, 0) for _ in stages]
    total = run(schedule, base).total_s
    assert run(schedule, replace(base, sends={F: sends, I: sends})).total_s > total
    assert run(schedule, replace(base, ready_s=[0.5] * 4)).total_s == pytest.approx(total + 0.5)
    for kind in (F, I, W):
        rows = [list(row) for row in base.seconds[kind]]
        rows[2][3] += 2.0
        assert run(schedule, replace(base, seconds={**base.seconds, kind: rows})).total_s >= total


def test_a_send_is_slowed_by_what_its_rank_sends_next() -> None:
    """Rank 0 of GPipe works 1 s on each micro-batch, of which 0.5 s is a transfer on tier 1. A send of 0.4 s
    that flows beside the next forward's first half second of transfer takes twice as long; on another tier it
    is not slowed at all."""
    schedule = build_schedule("GPipe", 2, 2)

    def total(tier: int) -> list[float]:
        sends = {F: [Send(0.0, 0.4, tier), None], I: [None, None]}
        work = uniform(schedule, 1, 1, 1)
        line = Stretch(((0.5, 1), (0.5, -1)), (), 0.0, 1.0)
        found = run(schedule, replace(work, sends=sends, lines=lambda kind, stage, count: [line]))
        return [found.arrived_s[0], found.arrived_s[1], found.done[0][1].end_s]

    assert total(0) == pytest.approx([1.4, 2.4, 2.0])
    # Sharing from 1.0 to 1.8, the send moves 0.4 and the transfer 0.4 of its 0.5: it ends at 1.9, the
    # forward at 2.4, and its own send, with nothing beside it, 0.4 later.
    assert total(1) == pytest.approx([1.8, 2.8, 2.4])


def test_work_that_is_remembered_is_work_that_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends forward on one tier and back on another, as long as each other: only one of them meets the ranks'
    own transfers, and what is remembered of the one is not taken for the other."""
    schedule = build_schedule("1F1B", 3, 8)
    sends = {F: [Send(0.1, 0.4, 0)] * 2 + [None], I: [None] + [Send(0.1, 0.4, 1)] * 2}
    line = Stretch(((0.5, 1), (0.5, -1)), (), 0.0, 1.0)
    work = replace(uniform(schedule, 1, 1, 1), sends=sends, lines=lambda kind, stage, count: [line])
    remembered = run(schedule, work)
    monkeypatch.setattr(engine, "_KEPT", 0)
    again = run(schedule, work)
    for one, other in zip(remembered.done, again.done, strict=True):
        assert [done.end_s for done in one] == pytest.approx([done.end_s for done in other], rel=1e-12)


def test_flows_of_the_data_axes_start_with_the_last_backward() -> None:
    schedule = build_schedule("1F1B", 2, 2)
    line = Stretch(((1.0, -1),), (), 0.0, 1.0)
    beside = [Beside(reductions={0: Flow(3.0, 1)}), Beside(reductions={1: Flow(0.5, 1)})]
    work = replace(uniform(schedule, 1, 0.5, 0.5), beside=beside, lines=lambda kind, stage, count: [line])
    found = run(schedule, work)
    assert found.drained_s(0) == pytest.approx(found.done[0][-1].start_s + 3.0)
    assert found.drained_s(1) == pytest.approx(found.done[1][-1].start_s + 0.5)


def test_a_deadlock_names_rank_and_action() -> None:
    schedule = build_schedule("1F1B", 2, 1)
    backwards_first = replace(schedule, orders=(schedule.orders[0], tuple(reversed(schedule.orders[1]))))
    with pytest.raises(ValueError, match=r"rank 0 stops at 0B0|rank 1 stops at 1B0"):
        run(backwards_first, uniform(schedule, 1, 1, 1))


def test_an_overlapped_pair_takes_turns() -> None:
    forward, backward = Action(2, F, 5), Action(1, B, 3)
    pair = Action(-1, build_schedule("DualPipeV", 1, 2).orders[0][0].kind, None, (forward, backward))

    def lines(kind: object, stage: int, micro_batch: int) -> list[str]:
        return [f"{kind}{stage}.{micro_batch}.{block}" for block in range(2)]

    assert lines_of(pair, lines) == ["F2.5.0", "I1.3.0", "F2.5.1", "I1.3.1", "W1.3.0", "W1.3.1"]


def test_events_are_linear_in_micro_batches() -> None:
    counts = []
    for count in (8, 16, 32):
        schedule = build_schedule("Interleaved1F1B", 4, count, 2)
        found = run(schedule, Work(uniform(schedule, 1, 1, 1).seconds))
        counts.append(sum(len(done) for done in found.done))
    assert counts == [counts[0], 2 * counts[0], 4 * counts[0]]
