"""Ranked plans, and the answers to what is asked beside them."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest
from tests.planner.spaces import deployment

from meshwright.errors import InputError
from meshwright.plan import read_plan
from meshwright.planner.answer import Answer, plan_deployment
from meshwright.planner.estimate import estimate
from meshwright.planner.explain import explain, remedies
from meshwright.planner.interval import half_width_of
from meshwright.planner.request import Answered, Request, answered
from meshwright.planner.scaling import fewest_gpus, parse_counts, parse_target, scaling
from meshwright.planner.variants import described, fixing, on_gpus, parse_choices
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import simulate
from meshwright.verify import verify

SMALL_GPU = {
    "name": "small",
    "memory": "24 GB",
    "memory_bandwidth": "1 TB/s",
    "peak": {"bf16": "100 TFLOP/s"},
}
LINKS = [{"name": "node", "kind": "pcie", "bandwidth": "32 GB/s", "latency": "5 us"}]


@pytest.fixture(scope="module")
def answer() -> Answer:
    return plan_deployment(deployment("moe", engine="megatron"))


@pytest.fixture(scope="module")
def crowded() -> Answer:
    """A model that fits on eight small GPUs in no way that the file allows."""
    return plan_deployment(on_small("llama-3-8b", layout={"pp": 1, "tp": 1}, recompute="none"))


def on_small(model: str, nodes: int = 1, **given: Any) -> Any:
    from meshwright.deployment import deployment_from

    cluster = {"nodes": nodes, "gpus_per_node": 8, "gpu": SMALL_GPU, "links": LINKS}
    document = {
        "cluster": cluster,
        "model": model,
        "workload": {"global_batch_size": 64, "sequence_length": 4096},
        "layout": given.pop("layout", {}),
        "policy": given,
    }
    return deployment_from(document, Path())


def test_plans_are_legal_and_ranked_by_simulation(answer: Answer) -> None:
    assert len(answer.plans) == 10
    times = [plan.step_time_s for plan in answer.plans]
    assert times == sorted(times)
    estimated = sorted(plan.step.total_s for plan in answer.plans)
    assert estimated == pytest.approx([found.step_time_s for found in answer.found.best], rel=1e-9)
    for ranked in answer.plans:
        simulated = simulate(ranked.plan)
        assert ranked.step_time_s == pytest.approx(simulated.step_time_s, rel=1e-9)
        assert ranked.simulated.bubble_fraction == pytest.approx(simulated.bubble_fraction, rel=1e-9)
        assert ranked.step.total_s == pytest.approx(estimate(ranked.plan).total_s, rel=1e-12)
        assert [f for f in verify(ranked.plan) if f.level == "error"] == []
        assert sum(ranked.parts.values()) == pytest.approx(ranked.step_time_s)
        assert ranked.fits


def test_simulation_decides_among_finalists() -> None:
    """Links that transfers share change the order."""
    given, _ = described("deepseek-v3", "h100-sxm", 512, None, None, ("layout.tp=4", "layout.pp=16"))
    found = plan_deployment(given, 10)
    times = [plan.step_time_s for plan in found.plans]
    assert times == sorted(times)
    assert [plan.step.total_s for plan in found.plans] != sorted(plan.step.total_s for plan in found.plans)


@pytest.mark.parametrize("top", [1, 3])
def test_fewer_plans_are_the_first_of_more(top: int) -> None:
    """Under schedules whose simulation is faster than the estimate too, whatever number is shown."""
    fixed = ("layout.pp=4", "layout.vpp=2")
    given, _ = described("qwen3-30b-a3b", "h100-sxm", 64, None, None, fixed)
    shown, every = plan_deployment(given, top).plans, plan_deployment(given, 10).plans
    assert [one.plan for one in shown] == [one.plan for one in every[:top]]


def test_rates_follow_from_the_step_time(answer: Answer) -> None:
    best = answer.plans[0]
    workload, cluster = best.plan.workload, best.plan.cluster
    tokens = workload.global_batch_size * 2048
    assert best.tokens_per_s == pytest.approx(tokens / best.step_time_s)
    expected = best.predictions()
    assert expected.tokens_per_s_per_gpu == pytest.approx(tokens / best.step_time_s / cluster.num_gpus)
    peak = cluster.gpu.peak["bf16"] * cluster.num_gpus
    assert expected.mfu == pytest.approx(best.step.model_flops / best.step_time_s / peak)
    assert 0 < expected.mfu < 1


def test_intervals_and_ties(answer: Answer) -> None:
    """A plan ties with the best where its interval reaches down into the best one's."""
    factor = exp(half_width_of("moe_full"))
    best = answer.plans[0]
    low, high = best.interval_s
    assert (low, high) == pytest.approx((best.step_time_s / factor, best.step_time_s * factor))
    tied = [i for i, plan in enumerate(answer.plans) if plan.interval_s[0] <= high]
    assert answer.ties[0] == tied
    assert answer.found.within_reach >= len(tied)


def test_confidence_names_what_is_not_measured(answer: Answer) -> None:
    confidence = answer.plans[0].confidence
    assert sum(confidence.shares.values()) == pytest.approx(1)
    shares = [item.share_fraction for item in confidence.unmeasured]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1 - confidence.shares["measured"])
    assert any("matmul" in item.what for item in confidence.unmeasured)


def test_the_document_has_the_keys_that_others_read(answer: Answer) -> None:
    document = answer.document()
    for key in ("legal", "priced", "feasible", "search_s", "search_cpu_s", "plans", "ties", "rejected"):
        assert document[key]
    assert document["legal"] == document["memory_rejected"] + document["feasible"]
    plan = document["plans"][0]
    for key in (
        *("layout", "policy", "step_time_s", "step_time_low_s", "step_time_high_s", "tokens_per_s_per_gpu"),
        *("sequences_per_s", "mfu", "bubble_fraction", "exposed_comm_s", "peak_memory_bytes"),
        *("memory_by_stage", "confidence"),
    ):
        assert key in plan
    assert plan["peak_memory_bytes"] == max(stage["total_bytes"] for stage in plan["memory_by_stage"])
    assert len(plan["memory_by_stage"]) == plan["layout"]["pp"]


def test_only_what_was_not_searched_counts_as_a_default(answer: Answer) -> None:
    assert "layout.tp" not in answer.defaults
    assert answer.defaults["cluster.links"].endswith("the h100-sxm catalogue machine")
    assert all("assumed" in why or "%" in why for why in answer.assumptions.values())


# --- length ranges ---


def test_a_range_is_ranked_on_its_lengths_and_fits_at_the_longest() -> None:
    given = deployment("moe", nodes=1, length={"min": 512, "max": 8192}, engine="megatron")
    found = plan_deployment(given, 3)
    best = found.plans[0]
    assert list(best.at_ends) == [512, 8192]
    assert best.at_ends[512] < best.step_time_s < best.at_ends[8192]
    shares = found.lengths.shares
    mean = sum(s * simulate(best.plan, Options(sequence_length=n)).step_time_s for n, s in shares)
    assert best.step_time_s == pytest.approx(mean, rel=1e-9)
    estimated = sum(s * estimate(best.plan, sequence_length=n).total_s for n, s in shares)
    assert best.step.total_s == pytest.approx(estimated, rel=1e-9)
    alone = plan_deployment(deployment("moe", nodes=1, length=8192, engine="megatron"), 3)
    assert found.found.memory_rejected == alone.found.memory_rejected
    assert "workload.sequence_length" in found.assumptions


# --- why not ---


def test_a_slower_choice_is_explained_by_its_parts(answer: Answer) -> None:
    explained = explain(answer, "tp=8,pp=2")
    assert explained.verdict == "slower"
    assert explained.plan is not None
    assert (explained.plan.plan.layout.tp, explained.plan.plan.layout.pp) == (8, 2)
    assert explained.by_part_s is not None
    assert sum(explained.by_part_s.values()) == pytest.approx(explained.slower_s)
    assert explained.slower_s == pytest.approx(explained.plan.step_time_s - answer.plans[0].step_time_s)
    assert "ms" in explained.why


def test_the_best_choice_is_said_to_be_it(answer: Answer) -> None:
    layout = answer.plans[0].plan.layout
    explained = explain(answer, f"tp={layout.tp},pp={layout.pp},ep={layout.ep}")
    assert (explained.verdict, explained.slower_s) == ("best", 0.0)


def test_an_illegal_choice_names_its_rule(answer: Answer) -> None:
    explained = explain(answer, "tp=16,policy.recompute=full,etp=16,layout.ep=16")
    assert explained.verdict == "illegal"
    assert "16" in explained.why


def test_a_choice_that_does_not_fit_says_by_how_much() -> None:
    roomy = plan_deployment(on_small("llama-3-8b", nodes=2), 1)
    assert roomy.best is not None
    explained = explain(roomy, "zero_stage=0,tp=1,pp=1,recompute=none")
    assert explained.verdict == "too large"
    assert explained.plan is not None
    assert explained.missing_bytes == explained.plan.peak_memory_bytes - 24_000_000_000
    assert f"{explained.missing_bytes / 1e9:.1f} GB" in explained.why
    assert "optimizer states" in explained.why


@pytest.mark.parametrize(
    "text", ["tp", "tp=", "=8", "tp=8,tp=4", "foo=1", "policy.tp=8", "tp=[", "tp=8," * 200, "layout.=3"]
)
def test_a_choice_that_is_none_is_refused(answer: Answer, text: str) -> None:
    with pytest.raises(InputError):
        explain(answer, text)


def test_values_are_checked_as_those_of_a_file(answer: Answer) -> None:
    with pytest.raises(InputError, match=r"layout\.tp"):
        explain(answer, "tp=none")
    assert parse_choices("tp=8, policy.recompute=full") == {"layout.tp": 8, "policy.recompute": "full"}


# --- nothing fits, nothing is legal ---


def test_nothing_fits_is_an_answer_with_what_helps(crowded: Answer) -> None:
    assert (crowded.best, crowded.plans, crowded.ties) == (None, (), [])
    assert crowded.nearest is not None
    assert crowded.nearest.peak_memory_bytes > 24e9
    document = crowded.document()
    assert (document["feasible"], document["plans"]) == (0, [])
    assert document["rejected"]["does not fit in the memory of a GPU"] == document["memory_rejected"]
    assert document["memory_rejected"] == document["legal"] > 0
    assert document["nearest"]["peak_memory_bytes"] == crowded.nearest.peak_memory_bytes
    helps = {remedy.change: remedy.feasible for remedy in remedies(crowded, most_doublings=2)}
    assert helps
    assert all(count > 0 for count in helps.values())


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"layout": {"tp": 3}}, "layout"),
        ({"layout": {"dp": 7}}, "layout.dp"),
        ({"layout": {"tp": 32}}, "layout"),
        ({"engine": "native", "precision": "fp8"}, "workload.precision"),
        ({"batch": 7, "layout": {"dp": 16}}, "workload.global_batch_size"),
    ],
)
def test_nothing_legal_is_refused_with_the_rule(given: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError) as refused:
        plan_deployment(deployment("moe", **given))
    assert refused.value.key == key


# --- scaling and targets ---


def test_scaling_keeps_the_batch_and_measures_against_the_smallest() -> None:
    given = deployment("dense", nodes=1, engine="megatron", recompute="none", layout={"dp": 8})
    rows = scaling(given, [4, 8, 32])
    assert [row.gpus for row in rows] == [4, 8, 32]
    assert all(row.plan is not None for row in rows)
    first = rows[0].plan
    for row in rows:
        assert row.plan is not None
        assert first is not None
        assert row.plan.plan.cluster.num_gpus == row.gpus
        assert row.plan.plan.workload.global_batch_size == given.workload.global_batch_size
        share = 4 * first.step_time_s / (row.gpus * row.plan.step_time_s)
        assert row.efficiency_fraction == pytest.approx(share)
    assert rows[0].efficiency_fraction == 1


def test_counts_that_cannot_be_are_refused() -> None:
    given = deployment("dense")
    for gpus in (0, 12, -8):
        with pytest.raises(InputError):
            on_gpus(given, gpus, "--scaling")
    for text in ("", "a", "8,,16", "0", "99999999"):
        with pytest.raises(InputError):
            parse_counts(text)


def test_a_target_is_met_by_the_fewest_gpus_tried() -> None:
    given = deployment("qwen3-8b", nodes=1, engine="megatron", recompute="none", zero_stage=1)
    alone = plan_deployment(given, 1).plans[0].step_time_s
    found = fewest_gpus(given, parse_target(f"step_time <= {0.6 * alone:.6f} s"))
    assert found.met
    assert found.nearest is not None
    assert found.nearest.plan is not None
    assert found.nearest.plan.step_time_s <= 0.6 * alone
    smaller = [row for row in found.tried if row.gpus < found.nearest.gpus]
    assert smaller
    assert all(row.plan is None or row.plan.step_time_s > 0.6 * alone for row in smaller)


def test_a_target_out_of_reach_says_how_far() -> None:
    given = deployment("dense", nodes=1, engine="megatron", recompute="none", zero_stage=1, batch=8)
    found = fewest_gpus(given, parse_target("tokens_per_s >= 1e15"))
    assert not found.met
    assert found.nearest is not None
    assert found.nearest.plan is not None
    assert found.document()["factor"] == pytest.approx(1e15 / found.nearest.plan.tokens_per_s)


@pytest.mark.parametrize(
    "text",
    [
        *("", "step_time", "step_time >= 3 s", "step_time <= 3", "tokens_per_s <= 3", "tokens_per_s >= x"),
        *("tokens_per_s >= -1", "mfu >= 1", "tokens_per_s >= inf"),
    ],
)
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_target(text)


# --- requests ---


def test_a_model_and_gpus_by_name_are_a_deployment() -> None:
    given, taken = described("qwen3-30b-a3b", "h100-sxm", 64)
    assert given.cluster.resolve()[0].num_gpus == 64
    assert set(taken) == {"workload.global_batch_size", "workload.sequence_length"}
    part, taken = described("qwen3-30b-a3b", "h100-sxm", 4, 256, 2048, ("workload.precision=fp16",))
    assert part.cluster.resolve()[0].gpus_per_node == 4
    assert (part.workload.global_batch_size, part.workload.precision, taken) == (256, "fp16", {})


@pytest.mark.parametrize(
    "request_",
    [
        Request(),
        Request(model="qwen3-30b-a3b"),
        Request(model="qwen3-30b-a3b", gpu="h100-sxm", gpus=12),
        Request(model="qwen3-30b-a3b", gpu="h100-sxm", gpus=0),
        Request(model="nothing", gpu="h100-sxm", gpus=8),
        Request(file="examples/qwen3-30b-a3b-16.yaml", gpus=8),
        Request(file="examples/qwen3-30b-a3b-16.yaml", top=0),
        Request(file="examples/qwen3-30b-a3b-16.yaml", explain="x=1"),
        Request(file="examples/qwen3-30b-a3b-16.yaml", scaling="12"),
        Request(file="examples/qwen3-30b-a3b-16.yaml", target="soon"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_before_the_search(request_: Request) -> None:
    with pytest.raises(InputError):
        answered(request_)


def test_the_best_plan_is_written_with_its_predictions(answer: Answer, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    Answered(answer, None).write(str(path))
    plan = read_plan(path)
    best = answer.plans[0]
    assert plan.digest == best.plan.digest
    assert plan.predictions == best.predictions()
    again = plan_deployment(fixing_all(path), 1)
    assert again.found.legal == 1
    assert again.plans[0].plan.layout == plan.layout
    assert again.plans[0].step_time_s == pytest.approx(best.step_time_s, rel=1e-9)


def fixing_all(path: Path) -> Any:
    from meshwright.deployment import Deployment
    from meshwright.plan import open_placement

    return open_placement(path, Deployment)


def test_no_plan_is_no_file(crowded: Answer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no plan fits"):
        Answered(crowded, None).write(str(tmp_path / "plan.yaml"))


def test_fixing_replaces_what_the_file_says_and_opens_what_is_none() -> None:
    given = deployment("moe", layout={"tp": 2, "pp": 2})
    changed = fixing(given, {"layout.tp": 4, "layout.pp": None, "policy.recompute": "full"})
    assert (changed.layout.tp, changed.layout.pp, changed.policy.recompute) == (4, None, "full")


def test_the_smallest_of_all_is_no_larger_than_the_smallest_of_a_part() -> None:
    def smallest(*overrides: str) -> int:
        asked = described("qwen3-30b-a3b", "h100-sxm", 7, 256, 4096, overrides)[0]
        answer = plan_deployment(asked, 1)
        assert answer.nearest is not None, "nothing fits 7 GPUs"
        return answer.nearest.peak_memory_bytes

    schedules = ("GPipe", "1F1B", "ZBVZeroBubble")
    assert smallest() <= min(smallest(f"policy.schedule={name}") for name in schedules)
