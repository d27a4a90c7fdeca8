"""Searching by arrays finds what one plan at a time would, and what pricing everything would."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tests.planner.spaces import TINY, deployment

from meshwright.cost.memory import memory, worst
from meshwright.ir.program import lower
from meshwright.planner.drafting import space_of
from meshwright.planner.estimate import estimate
from meshwright.planner.fitting import Fitting, columns_of
from meshwright.planner.prices import Prices, prices
from meshwright.planner.pricing import AtLength, Pricing, Wanted
from meshwright.planner.search import Found, Search
from meshwright.planner.space import Candidate, Space
from meshwright.planner.stages import stages_of
from meshwright.planner.tables import Tables


def made(*args: Any, **kwargs: Any) -> tuple[Space, Prices, Tables]:
    given = deployment(*args, **kwargs)
    space = space_of(given, given.cluster.resolve()[0])
    priced = prices(space.cluster, space.workload.precision, space.engine_name)
    return space, priced, Tables(space, priced, space.workload.max_sequence_length)


CASES: dict[str, dict[str, Any]] = {
    "dense": {"model": "dense", "nodes": 4, "batch": 96},
    "experts": {"model": "moe", "engine": "megatron", "nodes": 4},
    "native": {"model": "moe", "engine": "native"},
    "fsdp": {"model": "moe", "engine": "torchtitan"},
    "latent": {"model": "latent", "engine": "megatron"},
    "tied": {"model": "tied", "engine": "native"},
    "tied deepspeed": {"model": "tied", "engine": "deepspeed", "batch": 48},
    "fp8": {"model": "moe", "engine": "megatron", "precision": "fp8"},
    "long": {"model": "moe", "engine": "megatron", "length": 2**23, "batch": 8},
    "capacity": {
        "model": {**deployment("moe").model.model_dump(), "router": {"capacity_factor": 1.25}},
        "engine": "megatron",
    },
    "flat": {"model": "dense", "engine": "megatron", "efficiency": {"compute": "60%", "bandwidth": "80%"}},
    "skewed": {"model": "moe", "engine": "megatron", "routing": {"zipf": 0.5}},
    "windows": {"model": "gpt-oss-20b", "engine": "torchtitan", "nodes": 1},
    "replicas": {"model": "moe", "engine": "native", "layout": {"dp_replicas": 2}},
    "replicas of fsdp": {"model": "moe", "engine": "torchtitan", "layout": {"dp_replicas": 4}},
    "replicated heads": {"model": {**deployment("dense").model.model_dump(), "num_key_value_heads": 1}},
    "settings": {
        "model": "moe",
        "engine": "megatron",
        "settings": {
            "gradients": "bf16",
            "moments": "bf16",
            "loss": "fused",
            "recompute_modules": ["moe_act"],
        },
    },
}
SAMPLES = 50


@pytest.mark.parametrize("name", CASES)
def test_random_points_agree_with_one_plan_at_a_time(name: str) -> None:
    """Memory to the byte, time to 1e-9, and a bound that is none above the time."""
    space, priced, tables = made(**CASES[name])
    rng = random.Random(name)
    seen = 0
    while seen < SAMPLES:
        pp = rng.choice(list(space.bases))
        pipeline, choice = rng.choice(space.pipelines[pp]), rng.choice(space.choices)
        able = np.flatnonzero(space.runs(pipeline) & space.offers(pipeline, choice))
        if not len(able):
            continue
        rows = np.array(rng.sample(able.tolist(), min(5, len(able))))
        stages, columns = stages_of(space.model, pipeline), columns_of(tables, pp)
        used = Fitting(tables, pp, columns).worst_bytes(stages, choice, rows)
        pricing = Pricing([AtLength(tables, 1.0)], priced, pp, columns)
        seconds = pricing.seconds([Wanted(stages, choice, rows)])
        bounds = pricing.bound(stages, choice, rows)
        for row, size, time_s, bound_s in zip(rows, used, seconds, bounds, strict=True):
            plan = space.plan_of(Candidate(pipeline, choice, int(row)))
            where = f"{plan.layout} {plan.policy}"
            assert size == worst(memory(lower(plan))).total_bytes, where
            assert time_s == pytest.approx(estimate(plan).total_s, rel=1e-9), where
            assert bound_s <= time_s, where
            seen += 1


@pytest.mark.parametrize("batch", [4, 8, 16])
def test_no_bound_is_above_the_time_of_uneven_stages(batch: int) -> None:
    """Twelve layers on the first chunk, two on the next ones: ranks keep one another waiting less than equal
    stages would."""
    wide = {**TINY, "num_hidden_layers": 22, "vocab_size": 1024, "hidden_size": 4096}
    wide |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336}
    layout = {"pp": 2, "vpp": 2}
    given_ = {"engine": "megatron", "batch": batch, "nodes": 1, "length": 4096, "layout": layout}
    space, priced, tables = made(model=wide, layers_per_stage=[12, 2, 2, 6], **given_)
    search = Search(space, priced, [AtLength(tables, 1.0)], at_least=None)
    search.run()
    assert len(search.points) > 20
    assert (search.points.bounds <= search.points.seconds).all()


def outcome(found: Found, space: Space) -> tuple[Any, ...]:
    """What a search says, times to ten digits: sums are made in another order where less is priced."""
    best = [(p.candidate, f"{p.step_time_s:.10e}", p.peak_memory_bytes) for p in found.best]
    front = [(p.candidate, f"{p.step_time_s:.10e}", p.peak_memory_bytes) for p in found.front]
    return best, front, found.legal, found.memory_rejected, found.feasible, found.within_reach


@pytest.mark.parametrize("name", ["dense", "native", "fsdp", "latent", "skewed"])
def test_pruning_changes_nothing(name: str) -> None:
    """The best twenty, the front and the counts of a search that prices everything."""
    space, priced, tables = made(**CASES[name])
    lengths = [AtLength(tables, 1.0)]
    whole = Search(space, priced, lengths, reach=1.3, at_least=None).run()
    pruned = Search(space, priced, lengths, reach=1.3, at_least=0).run()
    assert whole.priced == whole.feasible == whole.legal - whole.memory_rejected
    assert pruned.priced < 0.9 * whole.priced
    assert outcome(pruned, space) == outcome(whole, space)


def test_the_best_is_the_least_of_all_estimates() -> None:
    """Without any of the search: every legal plan of one node estimated by itself."""
    fixed = {"engine": "megatron", "recompute": "none", "zero_stage": 1}
    space, priced, tables = made("moe", nodes=1, gpus_per_node=4, batch=4, length=1024, **fixed)
    found = Search(space, priced, [AtLength(tables, 1.0)]).run()
    best: list[float] = []
    for pp, pipelines in space.pipelines.items():
        for pipeline in pipelines:
            for choice in space.choices:
                for row in np.flatnonzero(space.runs(pipeline) & space.offers(pipeline, choice)):
                    plan = space.plan_of(Candidate(pipeline, choice, int(row)))
                    assert plan.layout.pp == pp
                    if worst(memory(lower(plan))).total_bytes <= space.cluster.gpu.memory:
                        best.append(estimate(plan).total_s)
    assert len(best) == found.feasible
    assert [p.step_time_s for p in found.best] == pytest.approx(sorted(best)[:20], rel=1e-9)


def test_a_search_repeats_itself() -> None:
    given = CASES["native"]
    results = []
    for _ in range(2):
        space, priced, tables = made(**given)
        results.append(outcome(Search(space, priced, [AtLength(tables, 1.0)], at_least=0).run(), space))
    assert results[0] == results[1]


def test_the_front_needs_less_memory_the_longer_it_takes() -> None:
    space, priced, tables = made("qwen3-30b-a3b", nodes=2, engine="megatron", dispatcher="alltoall")
    found = Search(space, priced, [AtLength(tables, 1.0)], at_least=0).run()
    times = [p.step_time_s for p in found.front]
    sizes = [p.peak_memory_bytes for p in found.front]
    assert found.front[0].candidate == found.best[0].candidate
    assert times == sorted(times)
    assert sizes == sorted(sizes, reverse=True)
    assert len(times) > 5


def test_what_misses_least_is_told_when_nothing_fits() -> None:
    gpu = {"name": "small", "memory": "6 GB", "memory_bandwidth": "1 TB/s", "peak": {"bf16": "100 TFLOP/s"}}
    links = [{"name": "node", "kind": "pcie", "bandwidth": "32 GB/s", "latency": "5 us"}]
    given = deployment("llama-3-70b", nodes=1, engine="megatron")
    cluster = given.cluster.resolve()[0].model_validate(
        {"nodes": 1, "gpus_per_node": 8, "gpu": gpu, "links": links}
    )
    space = space_of(given, cluster)
    priced = prices(cluster, "bf16", space.engine_name)
    tables = Tables(space, priced, 2048)
    found = Search(space, priced, [AtLength(tables, 1.0)]).run()
    assert (found.feasible, found.best, found.memory_rejected) == (0, (), found.legal)
    assert found.nearest is not None
    assert found.nearest.peak_memory_bytes > 6e9


def test_progress_goes_from_nothing_to_all() -> None:
    space, priced, tables = made(**CASES["dense"])
    shares: list[float] = []
    Search(space, priced, [AtLength(tables, 1.0)], at_least=0, progress=shares.append).run()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 10
