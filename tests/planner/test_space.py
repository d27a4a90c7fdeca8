"""What is searched: exactly what `verify` lets through, each candidate once, and what is fixed kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planner.spaces import MODELS, deployment

from meshwright.engines import engine_named
from meshwright.layout import Layout, divisors
from meshwright.plan import Plan, split_layers
from meshwright.planner.drafting import MICRO_BATCH_TOKENS, space_of
from meshwright.planner.space import Candidate, Choice, Pipeline, Space
from meshwright.policy import CHUNKED_SCHEDULES, SCHEDULES, V_SCHEDULES, EngineSettings, Policy
from meshwright.verify import verify

ENGINES = ("native", "megatron", "torchtitan", "deepspeed")


def space(*args: Any, **kwargs: Any) -> Space:
    given_ = deployment(*args, **kwargs)
    return space_of(given_, given_.cluster.resolve()[0])


def candidates(whole: Space) -> list[Candidate]:
    return [
        Candidate(pipeline, choice, int(row))
        for pipelines in whole.pipelines.values()
        for pipeline in pipelines
        for choice in whole.choices
        for row in np.flatnonzero(whole.runs(pipeline) & whole.offers(pipeline, choice))
    ]


def errors(plan: Plan) -> list[str]:
    return [f"{f.key}: {f.rule}" for f in verify(plan) if f.level == "error"]


def holds(whole: Space, plan: Plan) -> bool:
    """Whether a space has the point of a plan."""
    layout, policy = plan.layout, plan.policy
    pipeline = Pipeline(layout.pp, layout.vpp, policy.schedule, policy.layers_per_stage)
    choice = Choice(policy.zero_stage, policy.recompute, policy.dispatcher, policy.expert_overlap)
    if pipeline not in whole.pipelines.get(layout.pp, ()) or choice not in whole.choices:
        return False
    bases = whole.bases[layout.pp]
    same = np.ones(len(bases), bool)
    for axis in ("tp", "cp", "dp", "ep", "etp"):
        same &= getattr(bases, axis) == layout.size(axis)
    same &= bases.micro_batch == policy.micro_batch_size
    same &= bases.sequence_parallel == policy.sequence_parallel
    return bool((same & whole.runs(pipeline) & whole.offers(pipeline, choice)).any())


@st.composite
def points(draw: st.DrawFn) -> tuple[Space, Plan]:
    """A random layout and policy on 16 GPUs, legal or not, of what a search would write down."""
    name, engine = draw(st.sampled_from(sorted(MODELS))), draw(st.sampled_from(ENGINES))
    batch = draw(st.sampled_from([24, 32]))
    precision = draw(st.sampled_from(["bf16", "fp32"]))
    whole = space(
        name, batch=batch, engine=engine, precision=precision, length=draw(st.sampled_from([96, 2048]))
    )
    model, moe = whole.model, whole.model.is_moe
    tp, cp, pp = (draw(st.sampled_from(sizes)) for sizes in ([1, 2, 4, 8], [1, 2, 4], [1, 2, 4, 8, 16]))
    dp = 16 // (tp * cp * pp)
    if tp * cp * pp > 16:
        tp, cp, pp, dp = 1, 1, pp, 16 // pp
    ep = draw(st.sampled_from(divisors(16))) if moe else 1
    etp = draw(st.sampled_from([1, 2, 4, 8])) if moe else tp
    if (tp * cp * dp) % (ep * etp):
        ep, etp = 1, 1 if moe else tp
    schedule = draw(st.sampled_from(SCHEDULES)) if pp > 1 else "1F1B"
    vpp = 1
    if pp > 1 and schedule in CHUNKED_SCHEDULES:
        fewest = 2 if schedule == "Interleaved1F1B" else 1
        vpp = 2 if schedule in V_SCHEDULES else draw(st.integers(fewest, 4))
        even = [v for v in (1, 2, 3, 4) if model.num_hidden_layers % (pp * v) == 0 and v >= fewest]
        if schedule not in V_SCHEDULES and model.num_hidden_layers % pp == 0 and even:
            vpp = draw(st.sampled_from(even))
    if pp * vpp > model.num_hidden_layers:
        pp, vpp, schedule, dp = 1, 1, "1F1B", dp * pp
    layout = Layout(tp=tp, cp=cp, dp=dp, pp=pp, vpp=vpp, ep=ep, etp=etp)
    divides = ep > 1
    alone = layout.size("dp_cp") == 1 and layout.edp == 1
    zero = whole.plain.zero_stage
    if not alone or engine_named(engine).master_in_parameter.value:
        zero = draw(st.sampled_from([0, 1, 2, 3]))
    policy = Policy(
        engine=engine,
        micro_batch_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
        schedule=schedule,
        zero_stage=zero,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        dispatcher=draw(st.sampled_from(["allgather", "alltoall", "deepep", "hybridep"]))
        if divides
        else "alltoall",
        expert_overlap=divides and draw(st.booleans()),
        layers_per_stage=split_layers(model.num_hidden_layers, layout.num_stages),
        settings=EngineSettings(),
    )
    plan = Plan(
        name="point",
        cluster=whole.cluster,
        model=model,
        workload=whole.workload,
        layout=layout,
        policy=policy,
    )
    return whole, plan


def test_replicas_that_a_file_fixes_are_in_every_candidate_and_divide_its_data_axes() -> None:
    whole = space("moe", engine="native", layout={"dp_replicas": 2})
    every = candidates(whole)
    assert every
    for candidate in every[:: max(1, len(every) // 60)]:
        plan = whole.plan_of(candidate)
        assert plan.layout.dp_replicas == 2
        assert plan.policy.zero_stage > 0
        assert errors(plan) == []


@settings(max_examples=400, deadline=None)
@given(points())
def test_a_point_is_in_the_space_if_and_only_if_verify_lets_it_through(point: tuple[Space, Plan]) -> None:
    whole, plan = point
    assert holds(whole, plan) is (errors(plan) == []), (plan.layout, plan.policy, errors(plan))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("engine", ENGINES)
def test_every_candidate_is_legal_and_there_once(name: str, engine: str) -> None:
    whole = space(name, nodes=1, batch=16, engine=engine)
    every = candidates(whole)
    assert whole.legal == len(every)
    if not every:
        assert (name, engine) == ("latent", "native")
        assert list(whole.rejected) == ["the native engine does not run multi-head latent attention"]
        return
    for candidate in every[:: max(1, len(every) // 150)]:
        assert errors(whole.plan_of(candidate)) == []
    plans = {whole.plan_of(candidate).digest for candidate in every[::37]}
    assert len(plans) == len(every[::37])


def test_what_is_fixed_is_kept_and_all_else_is_named_as_searched() -> None:
    layout = {"tp": 2, "pp": 2, "ep": 4}
    whole = space("moe", layout=layout, engine="megatron", recompute="full", dispatcher="allgather")
    every = candidates(whole)
    assert every
    for candidate in every[::50]:
        plan = whole.plan_of(candidate)
        assert {axis: plan.layout.size(axis) for axis in layout} == layout
        policy = plan.policy
        assert (policy.engine, policy.recompute, policy.dispatcher) == ("megatron", "full", "allgather")
        assert {"layout.tp", "policy.recompute", "policy.engine"}.isdisjoint(plan.defaults)
        assert plan.defaults["layout.cp"].endswith(": searched")
        assert plan.defaults["policy.micro_batch_size"].endswith(": searched")


def test_choices_that_change_nothing_are_no_candidates() -> None:
    whole = space("moe", nodes=1, batch=16, engine="megatron")
    for candidate in candidates(whole):
        pipeline, choice, row = candidate.pipeline, candidate.choice, candidate.row
        base = whole.bases[pipeline.pp].where(row)
        if pipeline.pp == 1:
            assert (pipeline.schedule, pipeline.vpp) == ("1F1B", 1)
        if base.ep == 1:
            assert (choice.dispatcher, choice.expert_overlap) == ("alltoall", False)
        if base.tp == 1:
            assert not base.sequence_parallel
        if base.size("dp_cp") == 1 and base.size("edp") == 1:
            assert choice.zero_stage == 1


@pytest.mark.parametrize(("pp", "layers", "chunks"), [(4, 48, [2, 3, 4, 6, 12]), (8, 61, [2, 3, 4, 5, 6, 7])])
def test_chunks_divide_the_layers_of_a_rank_or_are_uneven_anyway(
    pp: int, layers: int, chunks: list[int]
) -> None:
    model = {**MODELS["dense"], "num_hidden_layers": layers}
    whole = space(model, layout={"pp": pp}, batch=64, engine="megatron")
    found = [p.vpp for p in whole.pipelines[pp] if p.schedule == "Interleaved1F1B"]
    assert found == chunks


def test_micro_batches_are_all_divisors_up_to_the_bound() -> None:
    whole = space("dense", batch=256, length=8192, layout={"tp": 8, "dp": 2, "cp": 1})
    assert set(whole.bases[1].micro_batch.tolist()) == {1, 2, 4, 8, 16}
    assert MICRO_BATCH_TOKENS == 16 * 8192
    long = space("dense", batch=4, length=2**18, layout={"tp": 8, "dp": 2, "cp": 1})
    assert set(long.bases[1].micro_batch.tolist()) == {1}


def test_refusals_are_counted_by_rule() -> None:
    whole = space("moe", batch=20, engine="deepspeed")
    assert whole.rejected["dp must divide global_batch_size = 20"] > 0
    assert whole.rejected["the deepspeed engine runs cp up to 1"] > 0
    assert all(count > 0 for count in whole.rejected.values())


@pytest.mark.parametrize(
    ("given_", "rule"),
    [
        ({"precision": "fp8", "engine": "native"}, "does not run fp8"),
        ({"layout": {"tp": 3}}, "tp must divide num_attention_heads"),
        ({"layout": {"dp": 7}}, "with dp = 7"),
        ({"layout": {"pp": 16}}, "each stage needs a layer"),
        ({"micro_batch_size": 5}, "micro_batch_size must divide"),
        ({"schedule": "GPipe", "layout": {"vpp": 2}}, "GPipe: GPipe runs one chunk per rank"),
        ({"layers_per_stage": (4, 5)}, "layers_per_stage must name every stage"),
    ],
)
def test_an_empty_space_says_why(given_: dict[str, Any], rule: str) -> None:
    whole = space("moe", nodes=3 if given_.get("layout") == {"tp": 3} else 2, batch=48, **given_)
    assert whole.legal == 0
    assert any(rule in known for known in whole.rejected), dict(whole.rejected)
