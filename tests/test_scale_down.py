"""Small plans are valid, keep each kind of parallelism that the ranks reach for, and say what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.deployment import deployment_from, read_deployment
from meshwright.errors import InputError
from meshwright.families import catalogue_models, model_named
from meshwright.ir.parameters import count_parameters
from meshwright.model import Model
from meshwright.plan import Plan, read_plan, resolve, write_plan
from meshwright.policy import CHUNKED_SCHEDULES, SCHEDULES, SPLIT_BACKWARD, V_SCHEDULES
from meshwright.scale_down import scaled_down
from meshwright.verify import verify
from meshwright.workload import LengthRange

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
RANKS = (8, 4, 2, 1)
DEGREES = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp")


def example(name: str) -> Plan:
    return resolve(read_deployment(next(path for path in EXAMPLES if path.stem == name)))


def errors(plan: Plan) -> list[object]:
    return [finding for finding in verify(plan) if finding.level == "error"]


def planned(model: str | dict[str, Any], layout: dict[str, int], **policy: Any) -> Plan:
    document: dict[str, Any] = {
        "cluster": {"nodes": 64, "gpu": "h100-sxm"},
        "model": model,
        "workload": {"global_batch_size": 4096, "sequence_length": 4096},
        "layout": layout,
        "policy": policy,
    }
    return resolve(deployment_from(document, Path()))


def field_changes(before: Plan, after: Plan) -> int:
    """Fields of layout, policy, model and workload that differ, a router's each by itself."""
    count = 0
    for part in ("layout", "policy", "model", "workload"):
        old, new = getattr(before, part), getattr(after, part)
        for name in type(old).model_fields:
            pair = getattr(old, name), getattr(new, name)
            if name == "router":
                count += sum(getattr(pair[0], f) != getattr(pair[1], f) for f in type(pair[0]).model_fields)
            elif name == "layers_per_stage":
                count += {min(pair[0]), max(pair[0])} != {min(pair[1]), max(pair[1])}
            else:
                count += (part, name) != ("model", "name") and pair[0] != pair[1]
    return count


def assert_kinds_are_kept(old: Model, new: Model, stages: tuple[int, ...]) -> None:
    for name in (
        "gated",
        "hidden_act",
        "norm",
        "norm_eps",
        "position",
        "rope_theta",
        "partial_rotary_factor",
        "qk_norm",
        "attention_bias",
        "attention_output_bias",
        "attention_sinks",
        "mlp_bias",
        "expert_bias",
        "tie_word_embeddings",
        "n_shared_experts",
        "shared_expert_gate",
        "is_moe",
    ):
        assert getattr(new, name) == getattr(old, name), name
    same = {"num_groups", "num_limited_groups"}
    assert new.router.model_dump(exclude=same) == old.router.model_dump(exclude=same)
    assert bool(new.shared_width) == bool(old.shared_width)
    assert not new.is_mla
    if not old.is_mla:
        ratio = old.num_attention_heads // old.kv_heads
        assert new.num_attention_heads // new.kv_heads == ratio
    if new.num_hidden_layers >= 2 * len(stages) or new.num_hidden_layers == old.num_hidden_layers:
        kinds = {old.layer_kind(layer) for layer in range(old.num_hidden_layers)}
        if min(stages) > 1:
            assert {new.layer_kind(layer) for layer in range(new.num_hidden_layers)} == kinds
    start = 0
    for layers in stages:
        if old.is_moe and layers > 1:
            assert any(new.is_moe_layer(layer) for layer in range(start, start + layers))
        start += layers
    assert new.num_experts_per_tok <= max(old.num_experts_per_tok, 0)


def assert_scales_down(plan: Plan, num_ranks: int) -> None:
    small = scaled_down(plan, num_ranks)
    new, layout = small.plan, small.plan.layout
    assert errors(new) == []
    assert new.cluster.num_gpus == layout.world_size == min(num_ranks, plan.layout.world_size)
    assert new.policy.engine == "native"
    assert layout.cp == 1
    divided = {
        "pp": plan.layout.pp > 1,
        "tp": plan.layout.tp > 1,
        "dp": plan.layout.dp * plan.layout.cp > 1,
    }
    reach = num_ranks
    for axis in ("pp", "tp", "dp"):
        kept = divided[axis] and reach > 1
        assert (layout.size(axis) > 1) == kept, axis
        reach //= 2 if kept else 1
    stage_ranks = layout.tp * layout.dp
    if plan.layout.ep > 1 and stage_ranks > 1:
        assert layout.ep == min(2 ** (plan.layout.ep.bit_length() - 1), 4, stage_ranks // layout.etp)
        if plan.model.num_experts >= 2 * plan.layout.ep:
            assert new.model.num_experts >= 2 * layout.ep
    if layout.pp == plan.layout.pp or layout.pp > 1:
        assert new.policy.schedule == plan.policy.schedule
        assert layout.vpp == min(plan.layout.vpp, 2)
    if layout.pp > 1:
        assert new.num_micro_batches >= 2 * layout.pp
    assert_kinds_are_kept(plan.model, new.model, new.policy.layers_per_stage)
    assert count_parameters(new.model).total < 20e6
    assert new.workload.max_sequence_length <= 256
    latent = 1 if plan.model.is_mla else 0
    hidden = sum(getattr(plan.model, name) != getattr(new.model, name) for name in LATENT)
    lines = field_changes(plan, new) - hidden + latent + 2 + (plan.training is None)
    assert len(small.changes) == lines, small.changes


LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_scales_down(path: Path, num_ranks: int) -> None:
    assert_scales_down(resolve(read_deployment(path)), num_ranks)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Catalogue models under layouts and policies of every engine."""
    name = draw(st.sampled_from(catalogue_models()))
    model = model_named(name)
    engine = draw(st.sampled_from(["megatron", "torchtitan", *(["native"] * (not model.is_mla))]))
    schedule = draw(st.sampled_from(("1F1B", "Interleaved1F1B") if engine == "megatron" else SCHEDULES))
    heads = model.num_attention_heads
    tp = draw(st.sampled_from([t for t in (1, 2, 4, 8) if heads % t == 0]))
    pp = draw(st.sampled_from((1, 2, 4)))
    cp = 1 if engine == "native" else draw(st.sampled_from((1, 2)))
    layout = {"tp": tp, "pp": pp, "cp": cp}
    if schedule in CHUNKED_SCHEDULES:
        layout["vpp"] = 2 if schedule in V_SCHEDULES else draw(st.sampled_from((2, 3)))
    if model.is_moe:
        folds = [e for e in (1, 2, 4, 8, 16) if model.num_experts % e == 0]
        layout["ep"] = draw(st.sampled_from(folds))
        layout["etp"] = draw(st.sampled_from(sorted({1, tp})))
    zero = draw(st.sampled_from((2, 3) if engine == "torchtitan" else (0, 1, 2, 3)))
    policy: dict[str, Any] = {
        "engine": engine,
        "schedule": schedule,
        "zero_stage": zero,
        "micro_batch_size": draw(st.sampled_from((1, 2, 4))),
        "recompute": draw(st.sampled_from(("none", "selective", "full"))),
    }
    if engine != "native":
        policy["dispatcher"] = draw(st.sampled_from(("alltoall", "deepep")))
        policy["expert_overlap"] = draw(st.booleans())
    return planned(name, layout, **policy)


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from(RANKS))
def test_catalogue_models_scale_down_under_any_layout(plan: Plan, num_ranks: int) -> None:
    assert_scales_down(plan, num_ranks)


@pytest.mark.parametrize("name", catalogue_models())
def test_every_catalogue_model_scales_down(name: str) -> None:
    plan = planned(name, {"tp": 2, "pp": 4, "ep": 4 if model_named(name).is_moe else 1})
    assert_scales_down(plan, 8)


def test_the_changes_of_the_repaired_brief() -> None:
    assert scaled_down(example("brief-repaired")).changes == (
        "parameters 4,466,084,864 → 2,430,080",
        "512 × brief-64gb → 8 processes of this machine",
        "tp 8 → 2",
        "dp 16 → 2",
        "pp 4 → 2",
        "ep 16 → 4",
        "layers per stage 4 each → 2 each",
        "layers 16 → 4",
        "hidden size 1,024 → 128",
        "vocabulary 50,257 → 256",
        "attention heads 16 → 4",
        "key-value heads 16 → 4",
        "head dim 64 → 32",
        "experts 64 → 8",
        "expert width 2,048 → 256",
        "global batch size 128 → 16",
        "sequence length 128–10,240 → 16–256",
        "precision fp16 → fp32",
        "training none stated → the defaults, 100 steps",
    )


def test_fewer_ranks_say_which_axes_had_to_go() -> None:
    changes = scaled_down(example("brief-repaired"), 2).changes
    assert "tp 8 → 1 (2 ranks do not reach for it)" in changes
    assert "dp 16 → 1 (2 ranks do not reach for it)" in changes
    assert "ep 16 → 1 (a stage has too few ranks)" in changes
    assert "sequence parallel on → off (tp is 1)" in changes


def test_what_the_native_engine_does_not_run_is_replaced_and_said() -> None:
    changes = scaled_down(example("deepseek-v3-2048")).changes
    assert "latent attention → multi-head attention (the native engine runs no latent attention)" in changes
    assert "dispatcher deepep → alltoall (the native engine does not run it)" in changes
    assert "expert overlap on → off (the native engine does not run it)" in changes
    assert "engine torchtitan → native" in changes


def test_context_parallel_ranks_count_as_data_parallel_ones() -> None:
    small = scaled_down(planned("llama-3-8b", {"tp": 1, "cp": 32, "dp": 1, "pp": 16}, engine="megatron"))
    assert (small.plan.layout.dp, small.plan.layout.pp) == (4, 2)
    assert "cp 32 → 1 (the native engine runs none; its ranks count as dp)" in small.changes


@pytest.mark.parametrize("schedule", sorted(SPLIT_BACKWARD))
def test_zero_3_gives_way_to_a_split_backward(schedule: str) -> None:
    layout = {"tp": 2, "pp": 2, "vpp": 2, "ep": 4}
    small = scaled_down(planned("mixtral-8x7b", layout, schedule=schedule, zero_stage=3))
    assert (small.plan.policy.schedule, small.plan.policy.zero_stage) == (schedule, 2)
    assert errors(small.plan) == []


def test_expert_tensor_parallelism_stays_where_it_folds() -> None:
    plan = planned("mixtral-8x7b", {"tp": 4, "pp": 2, "ep": 4, "etp": 4}, engine="megatron")
    layout = scaled_down(plan).plan.layout
    assert (layout.tp, layout.dp, layout.pp, layout.ep, layout.etp) == (2, 2, 2, 2, 2)
    layout = scaled_down(plan, 4).plan.layout
    assert (layout.tp, layout.ep, layout.etp) == (2, 2, 1)
    whole = planned("mixtral-8x7b", {"tp": 4, "pp": 2, "ep": 1}, engine="megatron")
    assert scaled_down(whole).plan.layout.etp == 2


def test_experts_stand_in_every_other_layer_and_windows_in_some() -> None:
    model = {
        "num_hidden_layers": 24,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "intermediate_size": 1024,
        "decoder_sparse_step": 4,
        "mlp_only_layers": [7],
        "num_experts": 32,
        "num_experts_per_tok": 20,
        "moe_intermediate_size": 256,
        "sliding_window": 1024,
        "sliding_window_layers": list(range(20, 24)),
        "position": "learned",
        "max_position_embeddings": 4096,
    }
    new = scaled_down(planned(model, {"tp": 2, "pp": 4, "ep": 4})).plan.model
    assert [new.is_moe_layer(layer) for layer in range(4)] == [False, True, False, True]
    assert (new.sliding_window, new.sliding_window_layers) == (64, (3,))
    assert new.num_experts_per_tok == 8  # more than half of the experts before, so more than half now
    assert new.max_position_embeddings == 256


def test_a_dense_model_with_fields_of_experts_stays_dense() -> None:
    model = model_named("qwen3-30b-a3b")
    dense = {**model.model_dump(), "mlp_only_layers": tuple(range(model.num_hidden_layers))}
    small = scaled_down(planned(dense, {"tp": 2, "pp": 2, "ep": 1, "etp": 2})).plan
    assert not small.model.is_moe
    assert errors(small) == []


def test_a_plan_of_fewer_ranks_divides_nothing_more() -> None:
    plan = scaled_down(example("brief-repaired"), 4).plan
    again = scaled_down(plan, 8)
    assert again.plan.layout.model_dump() == plan.layout.model_dump()
    assert any("of the 8 allowed" in line for line in again.changes)


def test_a_small_plan_scales_down_to_itself() -> None:
    small = scaled_down(example("qwen3-30b-a3b-16")).plan
    again = scaled_down(small)
    unnamed = small.model_copy(update={"model": small.model.model_copy(update={"name": ""})})
    same = again.plan.model_copy(update={"model": again.plan.model.model_copy(update={"name": ""})})
    assert same.digest == unnamed.digest


def test_equal_plans_give_equal_plans_and_files(tmp_path: Path) -> None:
    first, second = (scaled_down(example("mixtral-8x22b-128")) for _ in range(2))
    assert first == second
    write_plan(first.plan, tmp_path / "small.yaml")
    assert read_plan(tmp_path / "small.yaml") == first.plan


def test_precision_is_kept_on_request_where_native_runs_it() -> None:
    plan = example("brief-repaired")
    assert scaled_down(plan).plan.workload.precision == "fp32"
    assert scaled_down(plan, precision=None).plan.workload.precision == "fp16"
    assert scaled_down(plan, precision="bf16").plan.workload.precision == "bf16"
    eight = scaled_down(example("deepseek-v3-2048"), precision=None)
    assert "precision fp8 → fp32 (the native engine does not run it)" in eight.changes
    with pytest.raises(InputError, match="precision: 'fp8'"):
        scaled_down(plan, precision="fp8")


@pytest.mark.parametrize("num_ranks", [0, -2, 3, 6, 8192])
def test_ranks_are_a_power_of_two(num_ranks: int) -> None:
    with pytest.raises(InputError, match="power of two"):
        scaled_down(example("brief-repaired"), num_ranks)


def test_lengths_keep_their_form() -> None:
    plan = example("brief-repaired")
    spread = {"min": 128, "max": 10240, "mean": 2560}
    ranged = plan.workload.model_copy(update={"sequence_length": LengthRange(**spread)})
    lengths = scaled_down(plan.model_copy(update={"workload": ranged})).plan.workload.sequence_length
    assert lengths == LengthRange(min=16, max=256, mean=64)
    document = plan.document() | {"workload": {**HISTOGRAM, "routing": {"tokens": [[0, 0, 5], [1, 63, 9]]}}}
    for key in ("digest", "defaults", "training"):
        document.pop(key, None)
    small = scaled_down(resolve(deployment_from({**document, "cluster": CLUSTER}, Path())))
    assert small.plan.workload.sequence_length.model_dump() == {"counts": ((16, 3), (128, 4), (256, 1))}
    assert small.plan.workload.routing == "balanced"
    assert any(line.startswith("routing counted tokens → balanced") for line in small.changes)


CLUSTER = {"nodes": 64, "gpu": "h100-sxm"}
HISTOGRAM = {
    "global_batch_size": 128,
    "sequence_length": {"counts": [[64, 1], [128, 2], [2048, 4], [4096, 1]]},
}


def test_stated_training_is_kept_and_another_tokenizer_keeps_the_vocabulary() -> None:
    plan = example("brief-repaired")
    document = {**plan.document(), "training": {"steps": 7, "tokenizer": "tokenizer.json"}}
    for key in ("digest", "defaults"):
        document.pop(key, None)
    small = scaled_down(resolve(deployment_from({**document, "cluster": CLUSTER}, Path()))).plan
    assert small.training is not None
    assert small.training.steps == 7
    assert small.model.vocab_size == 50257
