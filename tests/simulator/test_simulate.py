"""Whole steps: agreement with the estimate, the critical path, chance, and what is printed of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulator.plans import MODEL, RUNNABLE, example, plan

from meshwright.cost.routing import fullest_rank
from meshwright.errors import InputError
from meshwright.ir.program import lower
from meshwright.plan import Plan
from meshwright.planner.estimate import StepTime, compose, estimate, measure_program
from meshwright.planner.prices import Conditions, prices
from meshwright.simulator.draws import Histogram, Spread, expert_loads
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import Simulated, sample_steps, simulate
from meshwright.simulator.work import coupled_ranks
from meshwright.workload import Lognormal, RoutingCounts, Zipf

NO_SENDS = Options(point_to_point=False, contention=False)
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GPipe": ({"pp": 4, "ep": 4}, {"schedule": "GPipe"}),
    "1F1B": ({"pp": 4, "ep": 4}, {"schedule": "1F1B"}),
    "one stage": ({"ep": 8}, {}),
    "tensor parallel": ({"tp": 2, "pp": 2, "ep": 4}, {"recompute": "full"}),
    "native": ({"pp": 2, "ep": 8}, {"engine": "native"}),
    "Interleaved1F1B": ({"pp": 4, "ep": 4, "vpp": 3}, {"schedule": "Interleaved1F1B"}),
    "InterleavedZeroBubble": (
        {"pp": 4, "ep": 4, "vpp": 2},
        {"schedule": "InterleavedZeroBubble", "engine": "torchtitan"},
    ),
    "ZBVZeroBubble": ({"pp": 4, "ep": 4, "vpp": 2}, {"schedule": "ZBVZeroBubble", "engine": "torchtitan"}),
    "DualPipeV": ({"pp": 4, "ep": 4, "vpp": 2}, {"schedule": "DualPipeV", "engine": "torchtitan"}),
}
"""Every schedule; the head, and layers that stages do not divide, make stages uneven."""


HIDDEN = Conditions(overlap={"pipeline": True})
"""Sends of several chunks flow beside compute, whatever the engine."""


def estimated(asked: Plan, sends: bool, conditions: Conditions) -> StepTime:
    """The estimate, with or without the time of sends."""
    rates = prices(asked.cluster, asked.workload.precision, asked.policy.engine, conditions)
    length = asked.workload.max_sequence_length
    measured = measure_program(lower(asked), rates, conditions, length)
    if not sends:
        measured = replace(measured, sends=tuple({} for _ in measured.sends))
    return compose(measured, rates)


@pytest.mark.parametrize("name", [*EXACT, *RUNNABLE])
def test_the_estimate_and_the_simulation_are_one(name: str) -> None:
    """Without sends, and without links that transfers share: whatever the schedule and the stages."""
    assert_one(plan(*EXACT[name]) if name in EXACT else example(name), sends=False)


@pytest.mark.parametrize("conditions", [Conditions(), HIDDEN], ids=["as the engine", "hidden"])
@pytest.mark.parametrize("name", [*EXACT, *RUNNABLE])
def test_sends_count_alike(name: str, conditions: Conditions) -> None:
    """What shows of them on the sender, and what is under way beside compute."""
    assert_one(plan(*EXACT[name]) if name in EXACT else example(name), True, conditions)


def assert_one(asked: Plan, sends: bool, conditions: Conditions | None = None) -> None:
    stated = conditions or Conditions()
    found = simulate(asked, Options(point_to_point=sends, contention=False, conditions=stated))
    expected = estimated(asked, sends, stated)
    assert found.step_time_s == pytest.approx(expected.total_s, rel=1e-9)
    assert found.bubble_fraction == pytest.approx(expected.bubble_fraction, rel=1e-9, abs=1e-12)
    for axis in ("tp", "cp", "ep", "etp", "pp"):
        assert found.exposed_comm_s[axis] == pytest.approx(expected.parts[axis], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", RUNNABLE)
def test_examples_agree_within_two_percent(name: str) -> None:
    asked = example(name)
    found = simulate(asked)
    assert found.step_time_s == pytest.approx(estimate(asked).total_s, rel=0.02)
    assert found.step_time_s >= simulate(asked, NO_SENDS).step_time_s


SMALL = [
    plan({"pp": 2, "vpp": 2, "ep": 4}, {"schedule": "Interleaved1F1B"}, {"global_batch_size": 32}),
    plan({"tp": 2, "pp": 4, "ep": 2}, {"schedule": "1F1B"}, {"global_batch_size": 16}),
    plan({"pp": 2, "ep": 8}, {"schedule": "DualPipeV", "engine": "torchtitan"}, {"global_batch_size": 32}),
    plan({"tp": 2, "ep": 8}, {"expert_overlap": True}, {"global_batch_size": 16}),
]
OPTIONS = st.builds(
    Options,
    point_to_point=st.booleans(),
    contention=st.booleans(),
    imbalance=st.sampled_from(["mean", Lognormal(lognormal=0.5), Spread(0.3)]),
    stragglers=st.sampled_from([None, Spread(0.05)]),
    every_rank=st.booleans(),
    seed=st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SMALL), OPTIONS)
def test_the_critical_path_fills_the_step(asked: Plan, options: Options) -> None:
    """Its links follow one another from 0 to the end without a gap, and its shares add up to one."""
    found = simulate(asked, options)
    links = found.critical_path.links
    assert links[0].start_s == pytest.approx(0.0, abs=1e-9)
    assert links[-1].end_s == pytest.approx(found.step_time_s, rel=1e-12)
    for before, after in pairwise(links):
        assert after.start_s == pytest.approx(before.end_s, abs=1e-9)
    assert found.critical_path.total_s == pytest.approx(found.step_time_s, rel=1e-9)
    assert sum(share.fraction for share in found.critical_path.shares) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SMALL), OPTIONS)
def test_no_rank_works_longer_than_the_step(asked: Plan, options: Options) -> None:
    found = simulate(asked, options)
    assert all(0 < use.busy_s <= found.step_time_s * (1 + 1e-9) for use in found.ranks)
    assert sum(use.stands_for for use in found.ranks) == asked.layout.world_size
    assert 0 <= found.bubble_fraction < 1
    ends = list(found.phases.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == pytest.approx(found.step_time_s)
    assert all(one[1] == pytest.approx(other[0]) for one, other in pairwise(ends))


def test_the_path_says_what_would_shorten_the_step() -> None:
    """On 64 nodes the exchange of tokens between nodes is the largest share, and sentences say so."""
    found = simulate(example("qwen3-30b-a3b-512"))
    first = found.critical_path.shares[0]
    assert (first.kind, first.axis, first.between_nodes) == ("all_to_all", "ep", True)
    words = found.critical_path.words()[0]
    assert words.startswith(f"all-to-all over ep between nodes is {100 * first.fraction:.0f} % of it")


def test_a_path_goes_through_the_pipeline() -> None:
    """With one micro-batch over four stages every stage's forward and backward are on the path, each once."""
    asked = plan({"pp": 4, "ep": 4}, {"schedule": "1F1B"}, {"global_batch_size": 4})
    path = simulate(asked).critical_path
    blocks = [link.name.split(" ")[0] for link in path.links if link.name.startswith("layers.")]
    visited = list(dict.fromkeys(blocks))
    assert visited == [f"layers.{layer}" for layer in range(16)]
    assert sum(link.kind == "send" for link in path.links) == 2 * 3


@pytest.mark.parametrize("asked", SMALL)
def test_events_are_all_that_happens(asked: Plan) -> None:
    """As many events as the simulation counts, but for those that take no time and leftovers of hidden
    communication; on a stream of compute or of one axis on one tier they never overlap."""
    found = simulate(asked)
    timeline = found.timeline()
    assert len(timeline.events) <= found.events + sum("rest of" in event.op for event in timeline.events)
    assert len(timeline.events) >= 0.8 * found.events
    by_stream: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for event in timeline.events:
        assert 0 <= event.start_s <= event.end_s <= found.step_time_s * (1 + 1e-9)
        by_stream.setdefault((event.rank, event.stream), []).append((event.start_s, event.end_s))
    for (_, stream), spans in by_stream.items():
        if not stream.startswith("pp "):
            spans.sort()
            overlap = max((a[1] - b[0] for a, b in pairwise(spans)), default=0.0)
            assert overlap <= 1e-9, stream


def test_a_rank_does_one_thing_at_a_time() -> None:
    """Streams that stand in a rank's own line, compute and what shows of communication, never overlap."""
    timeline = simulate(SMALL[0]).timeline()
    for rank in timeline.ranks:
        mine = [e for e in timeline.events if e.rank == rank and e.stream not in timeline.beside]
        spans = sorted((event.start_s, event.end_s) for event in mine)
        assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(spans))


def test_stragglers_slow_a_step_by_at_most_their_factor() -> None:
    asked = plan({"pp": 4, "ep": 4})
    base = simulate(asked, NO_SENDS)
    slow = simulate(asked, replace(NO_SENDS, stragglers=Histogram((1.2,), (1.0,))))
    assert base.step_time_s < slow.step_time_s < 1.2 * base.step_time_s
    some = simulate(asked, replace(NO_SENDS, stragglers=Histogram((1.0, 1.2), (0.9, 0.1))))
    assert base.step_time_s < some.step_time_s <= slow.step_time_s * (1 + 1e-12)


def test_one_pipeline_for_all_is_never_faster_than_each_by_itself() -> None:
    """With stragglers the pipeline that has the slowest rank of every stage ends no sooner than the slowest
    pipeline, and the more ranks wait for one another, the slower they are."""
    asked = plan({"pp": 2, "ep": 2}, {"schedule": "1F1B"})
    chance = replace(NO_SENDS, stragglers=Spread(0.1))
    every = simulate(asked, replace(chance, every_rank=True))
    assert simulate(asked, chance).step_time_s >= every.step_time_s >= simulate(asked, NO_SENDS).step_time_s
    assert len({use.pipeline for use in every.ranks}) == 8 // coupled_ranks(asked.layout) == 4


def test_equal_pipelines_are_one() -> None:
    asked = plan({"pp": 2, "ep": 4})
    one, every = simulate(asked, NO_SENDS), simulate(asked, replace(NO_SENDS, every_rank=True))
    assert every.step_time_s == one.step_time_s
    assert every.events == 2 * one.events


def test_samples_are_steps() -> None:
    """The first of many draws is what a single step with the same seed and shape of draws would be, draws
    differ, and their spread grows with that of the loads."""
    asked = example("brief-repaired")
    even = sample_steps(asked, Options(imbalance="described"), 5)
    assert even.step_time_s == pytest.approx([simulate(asked).step_time_s] * 5, rel=1e-12)
    wide = sample_steps(asked, Options(imbalance=Lognormal(lognormal=0.8)), 20)
    narrow = sample_steps(asked, Options(imbalance=Lognormal(lognormal=0.2)), 20)
    assert len(set(wide.step_time_s)) == 20
    assert np.std(wide.step_time_s) > np.std(narrow.step_time_s) > 0
    assert min(wide.step_time_s) > max(even.step_time_s)
    assert wide.quantile(0) <= wide.quantile(0.5) <= wide.quantile(1) == max(wide.step_time_s)
    single = Options(imbalance=Lognormal(lognormal=0.8), seed=4)
    assert sample_steps(asked, single, 1).step_time_s[0] == simulate(asked, single).step_time_s


def test_a_constant_load_is_the_mean_load_of_the_estimate() -> None:
    """Every layer drawn at the load that the estimate takes gives the estimate's step."""
    asked = plan({"ep": 8}, workload={"routing": {"zipf": 1.0}})
    load = fullest_rank(Zipf(zipf=1.0), 32, 8)
    drawn = simulate(asked, replace(NO_SENDS, imbalance=Histogram((load,), (1.0,))))
    assert drawn.step_time_s == pytest.approx(simulate(asked, NO_SENDS).step_time_s, rel=1e-12)
    assert drawn.step_time_s > simulate(plan({"ep": 8}), NO_SENDS).step_time_s


@pytest.mark.parametrize("routing", [Zipf(zipf=0.6), Lognormal(lognormal=0.5)])
def test_drawn_loads_average_to_the_described_one(routing: Zipf | Lognormal) -> None:
    rng, model = np.random.default_rng(1), plan().model
    loads = expert_loads(rng, routing, model, 8, (40, 4), 1000)
    assert loads.shape == (MODEL["num_hidden_layers"], 40, 4)
    assert loads.min() >= 1
    assert loads.mean() == pytest.approx(fullest_rank(routing, 32, 8), rel=0.05)


def test_counted_loads_scatter_less_the_more_is_routed() -> None:
    counts = RoutingCounts(tokens=tuple((0, expert, 100 + expert) for expert in range(32)))
    model = plan().model
    few, many = (
        expert_loads(np.random.default_rng(1), counts, model, 8, (10, 4), choices) for choices in (500, 10**7)
    )
    assert many.mean() == pytest.approx(fullest_rank(counts, 32, 8), rel=0.01)
    assert few.std() > 10 * many.std()


def test_what_cannot_be_simulated_is_refused_in_words() -> None:
    with pytest.raises(InputError, match=r"workload.global_batch_size.*at least 16 sequences"):
        simulate(plan({"ep": 8}, workload={"global_batch_size": 8}))
    with pytest.raises(InputError, match="at least one draw"):
        sample_steps(plan(), Options(), 0)
    with pytest.raises(InputError, match="one pipeline that stands for all"):
        sample_steps(plan(), Options(every_rank=True), 2)
    with pytest.raises(InputError, match="sigma"):
        Spread(-1)
    with pytest.raises(InputError, match="one weight"):
        Histogram((1.0, 1.1), (1.0,))


def test_shorter_sequences_take_less() -> None:
    def step(length: int | None) -> Simulated:
        return simulate(example("brief-repaired"), Options(sequence_length=length))

    assert step(1024).step_time_s < step(None).step_time_s
