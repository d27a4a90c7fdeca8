"""Plausible plans of what a row leaves open: legal, bounded, and no wider than what it leaves open."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.validate.run_rows import EXPERTS, carried, row_of

from meshwright.cost.memory import memory, worst
from meshwright.ir.program import lower
from meshwright.plan import Plan
from meshwright.validate.candidates import FULL_SHARE, MOST_CANDIDATES
from meshwright.validate.described import Run, describe
from meshwright.verify import verify


def run_of(**given_: Any) -> Run:
    described = describe(row_of(**given_))
    assert isinstance(described, Run), described
    return described


def plans(**given_: Any) -> list[Plan]:
    return [candidate.plan for candidate in run_of(**given_).candidates]


def values(found: list[Plan], part: str, name: str) -> list[Any]:
    return sorted({getattr(getattr(plan, part), name) for plan in found})


def test_a_row_that_states_everything_is_one_plan() -> None:
    (candidate,) = run_of().candidates
    plan = candidate.plan
    assert (plan.layout.dp, plan.policy.schedule, plan.policy.zero_stage) == (8, "1F1B", 1)
    assert plan.num_micro_batches == 8
    assert not {"micro_batch_size", "recompute", "vpp"} & candidate.assumed.keys()


@pytest.mark.parametrize("name", sorted(carried()))
def test_every_candidate_of_a_published_run_is_legal(name: str) -> None:
    run = describe(carried()[name])
    if not isinstance(run, Run):
        return
    assert 1 <= len(run.candidates) <= MOST_CANDIDATES
    digests = {candidate.plan.digest for candidate in run.candidates}
    assert len(digests) == len(run.candidates)
    for candidate in run.candidates:
        assert [f for f in verify(candidate.plan) if f.level == "error"] == []


def test_a_blank_micro_batch_is_a_power_of_two_that_divides() -> None:
    assert values(plans(micro_batch_size=None), "policy", "micro_batch_size") == [1, 2, 4, 8]
    assert values(plans(micro_batch_size=None, global_batch_size=16), "policy", "micro_batch_size") == [1, 2]
    long = {"sequence_length": 16384, "micro_batch_size": None}
    assert values(plans(**long), "policy", "micro_batch_size") == [1, 2]


def test_a_blank_recompute_is_none_or_a_part() -> None:
    found = run_of(recompute="").candidates
    assert [c.plan.policy.recompute for c in found] == ["none", "selective"]
    assert all("recompute" in c.assumed for c in found)
    experts = run_of(**EXPERTS, recompute="").candidates
    modules = [c.plan.policy.settings.recompute_modules for c in experts if c.plan.policy.recompute != "none"]
    assert set(modules) == {("layernorm", "moe_act")}


def test_all_recompute_is_plausible_where_experts_are_said_to_overlap_nothing() -> None:
    """Overlapping their exchange forbids full recompute: a row that turned it off may have had either."""
    off = plans(**EXPERTS, recompute="", dispatcher_overlap="NCCL alltoall; EP 1F1B overlap off")
    assert {plan.policy.recompute for plan in off} == {"none", "selective", "full"}
    unsaid = plans(**EXPERTS, recompute="", dispatcher_overlap="NCCL alltoall")
    assert {plan.policy.recompute for plan in unsaid} == {"none", "selective"}


def test_full_recompute_is_plausible_only_where_nothing_less_fits() -> None:
    large = {
        "num_layers": 80,
        "hidden_size": 8192,
        "feed_forward_size": 28672,
        "num_heads": 64,
        "num_kv_heads": 8,
        "head_dim": 128,
        "tp": 8,
        "num_gpus": 256,
        "sequence_length": 16384,
        "recompute": "",
    }
    found = plans(**large)
    assert {plan.policy.recompute for plan in found} == {"selective", "full"}
    for plan in found:
        if plan.policy.recompute == "selective":
            assert worst(memory(lower(plan))).total_bytes > FULL_SHARE * plan.cluster.gpu.memory
    assert {plan.policy.recompute for plan in plans(**{**large, "recompute": "none"})} == {"none"}


def test_what_does_not_fit_is_not_plausible() -> None:
    """Micro-batches of 8 would need more than the GPU has; those of 1 do not."""
    row = {"num_layers": 64, "hidden_size": 2048, "head_dim": 128, "sequence_length": 4096}
    found = plans(**row, micro_batch_size=None)
    assert 1 in values(found, "policy", "micro_batch_size")
    assert 8 not in values(found, "policy", "micro_batch_size")
    for plan in found:
        assert worst(memory(lower(plan))).total_bytes <= FULL_SHARE * plan.cluster.gpu.memory


def test_blank_chunks() -> None:
    assert values(plans(vpp=None), "layout", "vpp") == [1]  # no pipeline, no chunks
    assert values(plans(pp=2), "layout", "vpp") == [1, 2, 4]
    assert values(plans(pp=4), "layout", "vpp") == [1, 2]
    assert values(plans(pp=2, num_layers=9), "layout", "vpp") == [1, 2, 4]  # uneven either way
    assert values(plans(pp=2, vpp=4), "layout", "vpp") == [4]
    assert values(plans(pp=2, framework="Megatron-DeepSpeed", zero="none"), "layout", "vpp") == [1]


def test_layers_that_do_not_divide_are_split_as_evenly_as_they_go() -> None:
    (plan,) = plans(num_layers=9, pp=2, vpp=1)
    assert plan.policy.layers_per_stage == (5, 4)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(16, (1,) * 16), (15, (*(1,) * 15, 0)), (14, (0, *(1,) * 14, 0))],
)
def test_the_embedding_and_the_head_may_have_stages_of_their_own(
    layers: int, expected: tuple[int, ...]
) -> None:
    (plan,) = plans(num_layers=layers, pp=4, vpp=4)
    assert plan.policy.layers_per_stage == expected


def test_chunks_that_no_model_has_layers_for_are_fewer() -> None:
    (candidate,) = run_of(num_layers=13, pp=4, vpp=4).candidates
    assert candidate.plan.layout.vpp == 3
    assert "4 chunks leave stages without a layer" in candidate.assumed["vpp"]


def test_expert_degrees_left_open() -> None:
    whole = plans(**{**EXPERTS, "ep": None, "year": 2024}, num_gpus=32)
    assert values(whole, "layout", "ep") == [1, 8]
    exchanged = plans(**{**EXPERTS, "ep": None}, num_gpus=32, dispatcher_overlap="DeepEP")
    assert values(exchanged, "layout", "ep") == [8]


def test_experts_are_cut_as_attention_where_nothing_folds() -> None:
    given_ = {**EXPERTS, "tp": 2, "ep": 4, "num_gpus": 32, "pp": 2}
    open_, plain = (
        values(plans(**given_, framework=name), "layout", "etp")
        for name in ("Megatron-Core", "Megatron-Core: MCore 5D no folding")
    )
    assert (open_, plain) == ([1, 2], [2])


def test_a_blank_batch_fills_the_pipeline() -> None:
    (candidate,) = run_of(global_batch_size=None, pp=2, vpp=1).candidates
    assert candidate.plan.num_micro_batches == 16
    assert "global_batch_size" not in candidate.plan.defaults


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        ({"tp": None}, "degree not stated"),
        ({"pp": 0}, "degree not stated"),
        ({"tp": 3}, "do not divide the GPUs"),
        ({"global_batch_size": 13}, "no legal plan"),
        ({"micro_batch_size": 7}, "no legal plan"),
        ({"precision": "fp8", "gpu": "A100"}, "no legal plan"),
        ({"precision": "fp8", "framework": "Megatron-DeepSpeed", "zero": "none"}, "no legal plan"),
        ({**EXPERTS, "ep": 4, "tp": 8, "etp": 8}, "no legal plan"),
    ],
)
def test_what_makes_no_plan_is_refused(given_: dict[str, Any], reason: str) -> None:
    refused = describe(row_of(**given_))
    assert not isinstance(refused, Run)
    assert refused.reason.startswith("layout: ")
    assert reason in refused.reason
    assert refused.detail


@settings(max_examples=40, deadline=None)
@given(
    blank=st.sets(st.sampled_from(["micro_batch_size", "vpp", "cp", "ep", "etp", "global_batch_size"])),
    recompute=st.sampled_from(["", "none", "full", "selective: moe_act"]),
    degrees=st.sampled_from(list(product((1, 2), (1, 2, 4)))),
)
def test_candidates_keep_what_is_stated(blank: set[str], recompute: str, degrees: tuple[int, int]) -> None:
    tp, pp = degrees
    stated = {**EXPERTS, "tp": tp, "pp": pp, "vpp": 1, "etp": 1, "num_gpus": 64, "global_batch_size": 512}
    run = run_of(**{**stated, **dict.fromkeys(blank)}, recompute=recompute)
    assert 1 <= len(run.candidates) <= MOST_CANDIDATES
    for candidate in run.candidates:
        layout = candidate.plan.layout
        kept = {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "etp": layout.etp, "vpp": layout.vpp}
        for name, value in kept.items():
            assert name in blank or value == stated[name]
        assert layout.world_size == 64
        if recompute:
            assert candidate.plan.policy.recompute == recompute.split(":")[0]
