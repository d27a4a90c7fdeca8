"""A plan's step time: hand arithmetic where efficiencies are flat, and what must follow from what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from meshwright.cost.constants import constants, generation_of
from meshwright.cost.memory import memory, worst
from meshwright.cost.routing import fullest_rank
from meshwright.deployment import Deployment
from meshwright.engines import engines
from meshwright.eras import era_of, eras
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.ir.program import lower, model_flops
from meshwright.plan import Plan, resolve
from meshwright.planner.estimate import StepTime, compose, estimate, measure
from meshwright.planner.prices import Conditions, prices
from meshwright.planner.routing import fanout_of
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import simulate
from meshwright.workload import Lognormal, RoutingCounts, Zipf

DENSE = {
    "num_hidden_layers": 4,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 16384,
    "vocab_size": 32000,
}
EXPERTS = {
    "num_hidden_layers": 4,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1024,
    "vocab_size": 32000,
}


def plan(
    model: Mapping[str, Any] = EXPERTS,
    nodes: int = 2,
    cluster: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
    layout: Mapping[str, Any] | None = None,
    policy: Mapping[str, Any] | None = None,
) -> Plan:
    document = {
        "cluster": {"nodes": nodes, "gpu": "h100-sxm", **(cluster or {})},
        "model": model,
        "workload": {"global_batch_size": 64, "sequence_length": 4096, **(workload or {})},
        "layout": layout or {},
        "policy": {"engine": "megatron", **(policy or {})},
    }
    return resolve(decode(Deployment, document))


def test_parts_add_up_to_the_step() -> None:
    found = estimate(plan(layout={"tp": 2, "pp": 2, "ep": 8}))
    assert sum(found.parts.values()) == pytest.approx(found.total_s, rel=1e-12)
    assert all(seconds >= 0 for seconds in found.parts.values())


def test_compute_at_a_flat_efficiency_is_flops_over_rate() -> None:
    """One GPU, dense, flat 50 %: matmuls and attention take FLOPs / (0.5 · 989.4 TFLOP/s), by hand."""
    flat = {"efficiency": {"compute": "50%", "bandwidth": "100%"}, "gpus_per_node": 1}
    one = plan(DENSE, nodes=1, cluster=flat, workload={"global_batch_size": 1})
    tokens, layers, hidden, inner = 4096, 4, 4096, 16384
    linear = 2 * tokens * layers * (4 * hidden * hidden + 3 * hidden * inner) + 2 * tokens * hidden * 32000
    pairs = tokens * (tokens + 1) // 2 * layers * 32
    attention = pairs * (4 * 128 + 10 * 128)  # forward 2(d+d), backward 2(3d+2d), FlashAttention-2
    least = (3 * linear + attention) / (0.5 * 989.4e12)
    found = estimate(one)
    assert found.parts["compute"] > least  # memory-bound ops stand on top
    assert found.parts["compute"] < 1.15 * least
    assert found.parts["bubble"] == pytest.approx(0, abs=1e-12)
    assert found.parts["tp"] == found.parts["ep"] == found.parts["pp"] == 0


def test_a_step_never_beats_the_peak() -> None:
    for layout in ({"ep": 8}, {"tp": 4, "ep": 4}, {"pp": 2, "ep": 8}):
        mine = plan(layout=layout)
        bound = model_flops(mine, 4096) / (16 * mine.cluster.gpu.peak_flops_per_s("bf16"))
        assert estimate(mine).total_s > bound


def test_a_bubble_follows_its_schedule() -> None:
    """1F1B over 4 equal stages with 8 micro-batches idles (P − 1)/(m + P − 1) = 3/11 of the time, a little
    more because the last stage holds the head."""
    found = estimate(
        plan({**EXPERTS, "vocab_size": 128}, layout={"pp": 4}, workload={"global_batch_size": 32})
    )
    assert found.bubble_fraction == pytest.approx(3 / 11, rel=0.05)


def test_more_work_takes_longer() -> None:
    short = estimate(plan(layout={"ep": 8}))
    assert estimate(plan(layout={"ep": 8}, workload={"global_batch_size": 128})).total_s > short.total_s
    assert estimate(plan(layout={"ep": 8}, policy={"recompute": "full"})).total_s > short.total_s
    assert estimate(plan(layout={"ep": 8}), sequence_length=2048).total_s < short.total_s


def test_uneven_routing_costs_time() -> None:
    even = estimate(plan(layout={"ep": 16})).total_s
    skewed = estimate(plan(layout={"ep": 16}, workload={"routing": {"zipf": 1.0}})).total_s
    assert skewed > 1.02 * even


def test_the_fullest_expert_rank_holds_more() -> None:
    """Zipf 1 over 16 ranks: what is kept of routed tokens grows by the load, and nothing else does."""
    even, skewed = plan(layout={"ep": 16}), plan(layout={"ep": 16}, workload={"routing": {"zipf": 1.0}})
    load = fullest_rank(Zipf(zipf=1.0), 32, 16)
    routed = sum(
        size
        for block in lower(even).stages[0].blocks
        for name, (size, _) in block.saved.items()
        if ".moe.dispatched" in name
        or ".moe.experts." in name
        or ".moe.sort" in name
        or ".moe.unsort" in name
    )
    more = [worst(memory(lower(p))).line("activations") for p in (even, skewed)]
    assert more[1] - more[0] == pytest.approx((load - 1) * routed, rel=1e-6)


def test_what_overlaps_shows_less() -> None:
    def step(conditions: Conditions) -> StepTime:
        return estimate(plan(layout={"tp": 8}), conditions)

    hidden, shown = step(Conditions(overlap={"tensor": True})), step(Conditions(overlap={"tensor": False}))
    assert 0 < hidden.parts["tp"] < shown.parts["tp"]
    share = 1 - constants().hidden["tensor"].value
    assert hidden.parts["tp"] >= share * shown.parts["tp"] * (1 - 1e-9)  # and what has no compute beside it


def test_graphs_and_fixed_sizes_launch_faster() -> None:
    """Micro-batches of few tokens are bound by launches: a full graph frees them, a capacity helps."""
    few = plan(layout={"ep": 8}, workload={"sequence_length": 512})
    eager = estimate(few, Conditions(graphs="none")).parts["host"]
    fixed = estimate(few, Conditions(graphs="none", static_experts=True)).parts["host"]
    full = estimate(few, Conditions(graphs="full")).parts["host"]
    assert full < fixed < eager


def test_an_older_era_attends_through_memory() -> None:
    mine = plan(DENSE, workload={"precision": "bf16"})
    assert (
        estimate(mine, Conditions(era="megatron-2021")).parts["compute"]
        > 1.05 * estimate(mine, Conditions(era="megatron-2023")).parts["compute"]
    )


def test_an_unknown_era_is_refused() -> None:
    with pytest.raises(InputError, match="era"):
        estimate(plan(), Conditions(era="megatron-1999"))


def test_constants_can_be_changed_without_pricing_again() -> None:
    mine, stated = plan(layout={"ep": 8}), Conditions()
    priced = prices(mine.cluster, "bf16", "megatron", stated)
    measured = measure(mine, priced, stated)
    changed = constants().changed({"slowdown.hopper": 2 * constants().slowdown["hopper"].value})
    slower = compose(measured, prices(mine.cluster, "bf16", "megatron", stated, changed))
    assert slower.parts["compute"] > 1.5 * compose(measured, priced).parts["compute"]


@pytest.mark.parametrize(
    ("kind", "dispatcher", "ep", "pays"),
    [
        ("efa", "deepep", 16, True),
        ("efa", "alltoall", 16, False),
        ("ib", "deepep", 16, False),
        ("efa", "deepep", 8, False),
    ],
)
def test_an_exchange_from_kernels_pays_for_efa(kind: str, dispatcher: str, ep: int, pays: bool) -> None:
    """Four exchanges a layer and micro-batch, forward and back: each pays the constant where it leaves a node
    over EFA, and no other does."""
    links = [
        {"name": "node", "gpus": 8, "kind": "nvlink", "bandwidth": "450 GB/s", "latency": "3 us"},
        {"name": "fabric", "kind": kind, "bandwidth": "50 GB/s", "latency": "8 us"},
    ]
    mine = plan(cluster={"links": links}, layout={"ep": ep}, policy={"dispatcher": dispatcher})
    priced = {
        seconds: prices(mine.cluster, "bf16", "megatron", None, constants().changed({"efa": seconds}))
        for seconds in (0.0, 1e-3)
    }
    free, paid = (compose(measure(mine, one, Conditions()), one).parts["ep"] for one in priced.values())
    exchanges = 4 * mine.model.num_hidden_layers * mine.num_micro_batches
    assert paid - free == pytest.approx(exchanges * 1e-3 if pays else 0.0, abs=1e-12)
    simulated = []
    for one in priced.values():
        alone = Options(constants=one.constants, contention=False)
        simulated.append(simulate(mine, alone).exposed_comm_s["ep"])
    assert simulated[1] - simulated[0] == pytest.approx(paid - free, abs=1e-9)


def test_a_file_with_a_flat_efficiency_is_not_slowed_down_on_top() -> None:
    flat = plan(cluster={"efficiency": {"compute": "60%"}})
    assert prices(flat.cluster, "bf16", "megatron").slowdown == 1.0


def test_every_engine_has_an_era_and_the_constants_are_few() -> None:
    assert {era.engine for era in eras().values()} == set(engines())
    for engine in engines():
        assert eras()[era_of(engine)].engine == engine
    assert len(list(constants().flat())) <= 20


@pytest.mark.parametrize(
    ("gpu", "generation"),
    [("h100-sxm", "hopper"), ("gb300", "blackwell-ultra"), ("a100-40gb", "ampere"), ("brief-64gb", "other")],
)
def test_generations(gpu: str, generation: str) -> None:
    assert generation_of(gpu) == generation


def test_loads_of_the_fullest_rank() -> None:
    """Counts by hand: ranks hold experts {0, 1} and {2, 3}; 30 of 40 tokens stand on the first: 1.5."""
    counts = RoutingCounts(tokens=((0, 0, 20), (0, 1, 10), (0, 2, 5), (0, 3, 5)))
    assert fullest_rank(counts, 4, 2) == pytest.approx(1.5)
    assert fullest_rank("balanced", 64, 8) == 1.0
    assert fullest_rank(Zipf(zipf=0), 64, 8) == pytest.approx(1.0)
    assert fullest_rank(Zipf(zipf=1), 64, 64) == pytest.approx(64 / sum(1 / k for k in range(1, 65)))
    assert fullest_rank(Lognormal(lognormal=0.5), 64, 8) < fullest_rank(Lognormal(lognormal=0.5), 64, 64)


def test_a_token_reaches_as_many_nodes_as_its_groups_allow() -> None:
    limited = plan({**EXPERTS, "router": {"num_groups": 8, "num_limited_groups": 2}}).model
    assert fanout_of(limited).reached(8) <= 2.0 + 1e-9
    assert fanout_of(plan().model).reached(1) == pytest.approx(1.0)
