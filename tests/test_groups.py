"""Group tables, the links that groups cross, and what one rank holds."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain, product
from math import prod
from pathlib import Path
from typing import Any

import pytest

from meshwright.cluster import Cluster
from meshwright.deployment import deployment_from
from meshwright.errors import InputError
from meshwright.files import decode
from meshwright.groups import AXES_OF_VIEW, axis_groups, group_tables, rank_facts
from meshwright.ir.parameters import parameters
from meshwright.ir.sharding import copies, local_numel, zero_degree
from meshwright.layout import Layout, divisors
from meshwright.plan import Plan, resolve, resolve_layout
from meshwright.terminal import printable, rendered
from meshwright.terminal.groups import show_groups, show_rank
from meshwright.terminal.ranges import progression, runs
from meshwright.verify import cluster_findings

NODE = {"name": "node", "gpus": 8, "kind": "nvlink", "bandwidth": "450 GB/s", "latency": "3 us"}
FABRIC = {"name": "fabric", "kind": "ib", "bandwidth": "50 GB/s", "latency": "8 us"}
GPU = {
    "name": "h100-sxm",
    "memory": "80 GB",
    "memory_bandwidth": "3.35 TB/s",
    "peak": {"bf16": "989 TFLOP/s"},
}

LARGE = {
    "name": "qwen3-30b-a3b-512",
    "cluster": {"nodes": 64, "gpus_per_node": 8, "gpu": GPU, "links": [NODE, FABRIC]},
    "model": {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "qk_norm": "head",
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "workload": {"global_batch_size": 1024, "sequence_length": 4096},
    "layout": {"tp": 8, "pp": 4, "dp": 16, "ep": 16},
}

SMALL_MODEL = {
    "num_hidden_layers": 8,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 101,
    "intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}


def small(layout: dict[str, int], policy: dict[str, Any] | None = None, **model: Any) -> Plan:
    """A plan of a small model on one node, or on nodes of eight ranks above sixteen."""
    world = prod(layout.get(axis, 1) for axis in ("tp", "cp", "dp", "pp"))
    nodes = world // 8 if world > 16 else 1
    cluster = {"nodes": nodes, "gpus_per_node": world // nodes, "gpu": GPU, "links": [NODE, FABRIC]}
    cluster["links"] = [{**NODE, "gpus": world // nodes}, FABRIC]
    document = {
        "cluster": cluster,
        "model": {**SMALL_MODEL, **model},
        "workload": {"global_batch_size": 64, "sequence_length": 64},
        "layout": layout,
        "policy": policy or {},
    }
    return resolve(deployment_from(document, Path()))


@pytest.fixture(scope="module")
def large() -> Plan:
    return resolve(deployment_from(LARGE, Path()))


def test_tables_hold_every_axis_of_both_views() -> None:
    tables = group_tables(Layout(tp=2, pp=2, dp=2, ep=2, etp=1))
    assert tables == {
        "world_size": 8,
        "dense": {
            "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "cp": [[0], [1], [2], [3], [4], [5], [6], [7]],
            "dp": [[0, 2], [1, 3], [4, 6], [5, 7]],
            "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        },
        "expert": {
            "etp": [[0], [1], [2], [3], [4], [5], [6], [7]],
            "ep": [[0, 1], [2, 3], [4, 5], [6, 7]],
            "edp": [[0, 2], [1, 3], [4, 6], [5, 7]],
            "pp": [[0, 4], [1, 5], [2, 6], [3, 7]],
        },
    }


def test_dp_is_without_cp() -> None:
    tables = group_tables(Layout(cp=2, dp=2))
    assert tables["dense"]["dp"] == [[0, 2], [1, 3]]


def random_case(source: random.Random) -> tuple[Layout, Cluster]:
    per_node, nodes = source.choice([2, 4, 6, 8]), source.choice([1, 2, 3, 4, 6, 12])
    world = per_node * nodes
    tp = source.choice(divisors(world))
    cp = source.choice(divisors(world // tp))
    dp = source.choice(divisors(world // (tp * cp)))
    etp = source.choice(divisors(tp * cp * dp))
    ep = source.choice(divisors(tp * cp * dp // etp))
    links = [{**NODE, "gpus": per_node}, {**FABRIC, "name": "rack", "gpus": 2 * per_node}, FABRIC]
    cluster = {"nodes": nodes, "gpus_per_node": per_node, "gpu": GPU, "links": links}
    layout = Layout(tp=tp, cp=cp, dp=dp, pp=world // (tp * cp * dp), etp=etp, ep=ep)
    return layout, decode(Cluster, cluster, "cluster")


def test_tiers_counted_are_those_of_each_group() -> None:
    source = random.Random(7)
    for layout, cluster in (random_case(source) for _ in range(200)):
        for view, axes in AXES_OF_VIEW.items():
            for axis in axes:
                groups, listed = axis_groups(layout, cluster, axis, view), layout.groups(axis, view)
                assert [list(groups.group(i)) for i in range(groups.count)] == listed
                tiers = Counter(cluster.tier_of(group) for group in listed)
                expected = tuple(tiers[i] for i in range(len(cluster.links))) if groups.size > 1 else ()
                assert groups.num_by_tier == expected, (layout, cluster.gpus_per_node, axis)


def test_a_million_ranks_are_summed_up_at_once() -> None:
    cluster = decode(Cluster, {**LARGE["cluster"], "nodes": 2**17}, "cluster")  # type: ignore[dict-item]
    layout, used = Layout(tp=2, dp=2**14, pp=32, ep=64), {"layout.cp": "1: not divided"}
    start = time.perf_counter()
    text = rendered(lambda console: show_groups("million", cluster, layout, used, [], console))
    assert time.perf_counter() - start < 2.0
    assert len(text.splitlines()) <= 45


def test_a_rank_knows_its_place(large: Plan) -> None:
    facts = rank_facts(large, 137)
    assert (facts.node, facts.local_gpu) == (17, 1)
    assert facts.positions == {
        "dense": {"tp": 1, "cp": 0, "dp": 1, "pp": 1},
        "expert": {"etp": 0, "ep": 9, "edp": 0, "pp": 1},
    }
    assert facts.groups["dense"]["pp"] == [9, 137, 265, 393]
    assert facts.groups["expert"]["ep"] == list(range(128, 144))
    assert (facts.tiers["dense"]["tp"], facts.tiers["expert"]["ep"]) == (0, 1)
    assert [(c.stage, c.layers) for c in facts.chunks] == [(1, range(12, 24))]
    assert (facts.heads.query, facts.heads.key_value, facts.heads.num_copies) == (range(4, 8), range(1), 2)
    assert facts.experts == range(72, 80)
    assert facts.num_sequences == 64


def test_a_rank_counts_its_elements(large: Plan) -> None:
    """By hand: 12 layers of q, k, v, o, two norms, two head norms, the router and eight of 128 experts."""
    facts = rank_facts(large, 137)
    dense = 2 * 512 * 2048 + 2 * 128 * 2048 + 2 * 2048 + 2 * 128 + 128 * 2048
    experts = 3 * 8 * 768 * 2048
    assert facts.num_elements == 12 * (dense + experts)
    assert facts.num_zero_elements == 12 * (dense // 16 + experts // 8)


LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one rank": ({"dp": 1}, {}),
    "tp over kv heads": ({"tp": 4, "dp": 2, "pp": 2, "ep": 4}, {}),
    "etp": ({"tp": 2, "cp": 2, "dp": 2, "pp": 2, "ep": 2, "etp": 4}, {"engine": "megatron"}),
    "interleaved": ({"tp": 2, "dp": 2, "pp": 2, "vpp": 2, "ep": 4}, {}),
    "V": ({"tp": 2, "dp": 2, "pp": 4, "vpp": 2, "ep": 2}, {"schedule": "ZBVZeroBubble"}),
    "uneven": ({"dp": 4, "pp": 3, "ep": 4}, {"layers_per_stage": [2, 3, 3]}),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_ranks_together_hold_the_model(name: str, tied: bool) -> None:
    """Each element of each parameter lies on as many ranks of its stage as `copies` says."""
    layout, policy = LAYOUTS[name]
    plan = small(layout, policy, tie_word_embeddings=tied)
    held: dict[str, Counter[tuple[int, ...]]] = {}
    for rank in range(plan.layout.world_size):
        for piece in rank_facts(plan, rank).slices:
            for layer in piece.layers or [None]:
                name_here = piece.name.replace("*", str(layer))
                elements = product(*(range(start, stop) for start, stop in piece.ranges))
                held.setdefault(name_here, Counter()).update(elements)
    known = {param.name: param for param in parameters(plan.model)}
    assert held.keys() == known.keys()
    for key, param in known.items():
        assert len(held[key]) == param.numel, key
        both_ends = tied and key == "embedding.weight" and _ends_lie_apart(plan)
        assert set(held[key].values()) == {copies(param, plan.layout) * (2 if both_ends else 1)}, key


def _ends_lie_apart(plan: Plan) -> bool:
    facts = rank_facts(plan, 0)
    return not (facts.chunks[0].has_embedding and any(chunk.has_head for chunk in facts.chunks))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_experts_and_heads_are_divided(name: str) -> None:
    plan = small(*LAYOUTS[name])
    layout, facts = plan.layout, [rank_facts(plan, r) for r in range(plan.layout.world_size)]
    for group in layout.groups("pp"):
        layers = chain.from_iterable(chunk.layers for rank in group for chunk in facts[rank].chunks)
        assert sorted(layers) == list(range(plan.model.num_hidden_layers))
        chunks = [chunk for rank in group for chunk in facts[rank].chunks]
        assert sorted(chunk.stage for chunk in chunks) == list(range(layout.num_stages))
        assert [sum(c.has_embedding for c in chunks), sum(c.has_head for c in chunks)] == [1, 1]
    for group in layout.groups("ep", "expert"):
        assert sorted(chain.from_iterable(facts[rank].experts for rank in group)) == list(range(8))
    for group in layout.groups("etp", "expert"):
        assert sorted(chain.from_iterable(facts[rank].expert_columns for rank in group)) == list(range(16))
    for group in layout.groups("tp"):
        assert sorted(chain.from_iterable(facts[rank].heads.query for rank in group)) == list(range(8))
        key_value = Counter(chain.from_iterable(facts[rank].heads.key_value for rank in group))
        assert key_value == dict.fromkeys(range(2), facts[0].heads.num_copies)
    assert sum(f.num_sequences or 0 for f in facts) == 64 * layout.world_size // layout.dp


@pytest.mark.parametrize("name", LAYOUTS)
def test_slices_are_those_of_the_declaration(name: str) -> None:
    plan = small(*LAYOUTS[name])
    known = {param.name: param for param in parameters(plan.model)}
    facts = rank_facts(plan, plan.layout.world_size - 1)
    for piece in facts.slices:
        for layer in piece.layers or [None]:
            param = known[piece.name.replace("*", str(layer))]
            assert piece.local_numel == local_numel(param, plan.layout)
            assert piece.zero_ranks == zero_degree(param, plan.layout)


def test_a_stage_without_experts_says_so() -> None:
    plan = small({"dp": 2, "pp": 4, "ep": 2}, first_k_dense_replace=2)
    facts = rank_facts(plan, 0)
    assert len(facts.experts) == len(facts.expert_columns) == 0
    assert "none: no layer here has them" in rendered(lambda c: show_rank(plan, facts, [], c))


def test_neither_batch_nor_engine_are_asked() -> None:
    plan = small({"tp": 2, "cp": 2, "dp": 3, "pp": 2, "ep": 2})  # 64 sequences over 3; native has no cp
    facts = rank_facts(plan, 0)
    assert facts.num_sequences is None
    assert "64 sequences do not divide by dp = 3" in rendered(lambda c: show_rank(plan, facts, [], c))


@pytest.mark.parametrize(
    ("layout", "policy", "key"),
    [
        ({"tp": 3, "dp": 2}, {}, "layout.tp"),
        ({"dp": 16, "ep": 16}, {}, "layout.ep"),
        ({"pp": 2, "dp": 2}, {"layers_per_stage": [3, 3]}, "policy.layers_per_stage"),
        ({"pp": 2, "dp": 2, "vpp": 4}, {"schedule": "DualPipeV"}, "layout.vpp"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(
    layout: dict[str, int], policy: dict[str, Any], key: str
) -> None:
    plan = small(layout, policy)
    with pytest.raises(InputError) as caught:
        rank_facts(plan, 0)
    assert caught.value.key == key


def test_the_document_of_a_rank_is_plain_json(large: Plan) -> None:
    document = rank_facts(large, 511).document()
    assert document["coordinates"]["dense"] == {"tp": 7, "cp": 0, "dp": 15, "pp": 3}
    assert document["groups"]["dense"]["tp"] == list(range(504, 512))
    assert document["chunks"][0]["head"] is True
    head = document["parameters"][-1]
    assert (head["name"], head["local_shape"], head["ranges"]) == (
        "head.weight",
        [18992, 2048],
        [[132944, 151936], [0, 2048]],
    )


def plain_groups(document: dict[str, Any], width: int | None = None) -> str:
    deployment = deployment_from(document, Path())
    cluster, used = deployment.cluster.resolve()
    layout, chosen = resolve_layout(deployment.layout, cluster, deployment.policy.schedule)
    findings = list(cluster_findings(cluster, layout))
    return rendered(
        lambda console: show_groups(deployment.name, cluster, layout, {**used, **chosen}, findings, console),
        width=width,
    )


def test_groups_on_the_terminal(golden: Callable[[str, str], None]) -> None:
    golden("groups_512.txt", plain_groups(LARGE))


def test_groups_of_few_ranks_on_the_terminal(golden: Callable[[str, str], None]) -> None:
    layout = {"tp": 2, "cp": 2, "dp": 4, "pp": 2, "ep": 4, "etp": 2}
    golden("groups_32.txt", plain_groups({**LARGE, "cluster": {**_cluster(4)}, "layout": layout}))


def test_one_rank_on_the_terminal(large: Plan, golden: Callable[[str, str], None]) -> None:
    facts = rank_facts(large, 137)
    golden("groups_rank_137.txt", rendered(lambda console: show_rank(large, facts, [], console)))


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_breaks_no_number(width: int) -> None:
    cluster, layout = _cluster(16384), {"tp": 1, "pp": 4, "ep": 16}
    document = {**LARGE, "cluster": cluster, "layout": layout}
    document["workload"] = {"global_batch_size": 131072, "sequence_length": 4096}
    plan = resolve(deployment_from(document, Path()))
    facts = rank_facts(plan, 3)
    text = plain_groups(document, width) + rendered(lambda c: show_rank(plan, facts, [], c), width=width)
    assert max(map(len, text.splitlines())) <= width
    for whole in ("32768-65535", "98304-131071", "131056-131071", "128×768×2048", "151936×2048"):
        assert whole in text


def _cluster(nodes: int) -> dict[str, Any]:
    return {"nodes": nodes, "gpus_per_node": 8, "gpu": GPU, "links": [NODE, FABRIC]}


@pytest.mark.parametrize(
    "layout",
    [
        {"dp": 512, "ep": 8},
        {"tp": 16, "ep": 64},
        {"tp": 4, "cp": 4, "pp": 2, "ep": 32, "etp": 2},
        {"pp": 128, "tp": 4},
        {"tp": 8, "pp": 4, "ep": 16},
    ],
)
def test_512_ranks_fit_on_a_screen(layout: dict[str, int]) -> None:
    lines = plain_groups({**LARGE, "layout": layout}).splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 110


def test_text_of_a_file_has_no_colours_and_one_of_a_terminal_has(
    large: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    facts = rank_facts(large, 0)
    for show in (
        lambda c: show_rank(large, facts, [], c),
        lambda c: show_groups("x", large.cluster, large.layout, {}, [], c),
    ):
        plain, coloured = rendered(show), rendered(show, is_terminal=True)
        assert "\x1b" not in plain
        assert "\x1b[" in coloured
        assert max(len(line) for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()) <= 90


def test_names_of_a_file_cannot_steer_the_terminal() -> None:
    name = "evil\x1b[2J\n[bold red]:boom:"
    cluster = {**_cluster(64), "gpu": {**GPU, "name": "x\x07y"}}
    text = plain_groups({**LARGE, "name": name, "cluster": cluster})
    assert text.splitlines()[0] == "evil?[2J [bold red]:boom:: 512 ranks on 64 × 8 x?y"
    assert printable("a\tb\r\nc\u202e") == "a b c?"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([5], "5"),
        ([0, 1], "0-1"),
        ([0, 8], "0,8"),
        (range(8), "0-7"),
        (range(0, 32, 8), "0,8,16,24"),
        (range(1, 128, 8), "1,9,17,…,121"),
    ],
)
def test_rank_lists_are_short(ranks: list[int], text: str) -> None:
    assert progression(ranks) == text


def test_runs() -> None:
    assert runs([3, 1, 2, 8, 9, 12]) == "1-3,8-9,12"
    assert runs([]) == "none"
