"""Families against transformers: every model of the catalogue and random configurations, to the parameter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright import families
from meshwright.errors import InputError
from meshwright.families import catalogue_models, model_from_config, model_named, read_model
from meshwright.ir.parameters import count_parameters, layer_parameters, parameters
from meshwright.model import MAX_LAYERS, Model

HF_TYPE = {"kimi_k2": "deepseek_v3"}  # the same shape; transformers has no class of that name
SIZES = {"num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 8, "vocab_size": 64}


def catalogue_config(name: str) -> dict[str, Any]:
    path = package_files("meshwright").joinpath(f"catalog/models/{name}.json")
    return dict(json.loads(path.read_text("utf-8")))


def hf_model(config: dict[str, Any]) -> Any:
    """The causal model that transformers builds from a config, without storage."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in config.items() if not key.startswith("_") and key != "model_type"}
    model_type = HF_TYPE.get(config["model_type"], config["model_type"])
    hf_config = transformers.AutoConfig.for_model(model_type, **keys)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(hf_config)


def part_of(name: str) -> str:
    """Our part of a parameter by its name in transformers."""
    for mark, part in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("self_attn", "attention"),
        (".mlp.gate.", "router"),
        (".mlp.router.", "router"),
        (".mlp.experts.", "experts"),
        (".mlp.shared_expert", "shared_experts"),
        (".mlp.", "dense_mlp"),
        ("norm", "norms"),
    ):
        if mark in name:
            return part
    raise AssertionError(f"unknown parameter {name}")


def layer_of(name: str) -> int:
    """Layer of a parameter in either naming; -1 outside the layers."""
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else -1


def assert_same_parameters(config: dict[str, Any]) -> None:
    model = model_from_config(config)
    theirs: Counter[tuple[int, str]] = Counter()
    for name, parameter in hf_model(config).named_parameters():
        theirs[layer_of(name), part_of(name)] += parameter.numel()
    ours: Counter[tuple[int, str]] = Counter()
    for param in parameters(model):
        ours[layer_of(param.name), param.part] += param.numel
    assert +ours == +theirs  # a layer's shared experts of width 0 are in neither
    counts = count_parameters(model)
    assert counts.total == theirs.total()
    by_part: Counter[str] = Counter()
    for (_, part), numel in theirs.items():
        by_part[part] += numel
    assert +Counter(counts.by_part) == +by_part
    with_experts = {layer for layer, part in theirs if part == "experts"}
    assert {layer for layer in range(model.num_hidden_layers) if model.is_moe_layer(layer)} == with_experts


@pytest.mark.parametrize("name", catalogue_models())
def test_catalogue_has_the_parameters_of_transformers(name: str) -> None:
    assert_same_parameters(catalogue_config(name))


@dataclass(frozen=True)
class Published:
    """A published pair in billions, as printed. `cut`: the print drops further digits instead of rounding.

    `total_of` and `active_of` say what the publication counts where that is not every parameter of the
    model: "no embedding" leaves the input embedding out, "layers" both embedding and output projection, and
    "layers + mtp" adds the multi-token-prediction layer to those.
    """

    name: str
    total: str
    active: str
    total_of: str = "all"
    active_of: str = "all"
    cut: bool = False


PUBLISHED = (
    Published("mixtral-8x7b", "46.7", "12.9"),  # arXiv:2401.04088 and its announcement
    Published("mixtral-8x22b", "141", "39"),  # mistral.ai/news/mixtral-8x22b
    Published("qwen3-30b-a3b", "30.5", "3.3", cut=True),  # model card; 3.35 is printed 3.3
    Published("qwen3-235b-a22b", "235", "22"),  # model card
    Published("olmoe-1b-7b", "6.9", "1.3"),  # arXiv:2409.02060 Table 1
    Published("deepseek-v3", "671", "37", active_of="no embedding"),  # arXiv:2412.19437; 37.6 with it
    Published("deepseek-v2", "236", "21"),  # arXiv:2405.04434, whose 2.4 below is 2.45 without embedding
    Published("deepseek-v2-lite", "15.7", "2.4", active_of="no embedding", cut=True),
    Published("kimi-k2", "1.0e3", "32", active_of="no embedding"),  # model card: 1T and 32B
    Published("gpt-oss-120b", "116.8", "5.1", active_of="no embedding"),  # arXiv:2508.10925 Table 1
    Published("gpt-oss-20b", "20.9", "3.6", active_of="no embedding"),
    Published(
        "glm-4.5", "355", "32", total_of="layers + mtp", active_of="layers"
    ),  # arXiv:2508.06471 Table 1
    Published("glm-4.5-air", "106", "12", total_of="layers", active_of="layers"),  # 108 with its mtp layer
    Published("qwen2-57b-a14b", "57.4", "14"),  # arXiv:2407.10671
    Published("qwen1.5-moe-a2.7b", "14.3", "2.7"),  # model card
    Published("llama-3.1-405b", "405", "405", cut=True),  # arXiv:2407.21783
    Published("llama-3.1-70b", "70.6", "70.6"),
    Published("llama-3-8b", "8.03", "8.03"),
    Published("mistral-7b", "7.24", "7.24"),
    Published("qwen2.5-7b", "7.61", "7.61", cut=True),  # model card; 7.616 is printed 7.61
    Published("qwen2.5-72b", "72.7", "72.7"),
    Published("qwen3-8b", "8.2", "8.2"),
    Published("qwen3-32b", "32.8", "32.8"),
)


def counted(model: Model, numel: int, what: str) -> int:
    embedding = model.vocab_size * model.hidden_size
    if what == "no embedding":
        return numel - embedding
    if what.startswith("layers"):
        numel -= 2 * embedding
    if what.endswith(
        "mtp"
    ):  # a layer, the projection of two hidden states to one, two norms before it, one after
        numel += sum(param.numel for param in layer_parameters(model, model.num_hidden_layers - 1))
        numel += 2 * model.hidden_size**2 + 3 * model.hidden_size
    return numel


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda row: row.name)
def test_catalogue_has_the_published_sizes(published: Published) -> None:
    model = model_named(published.name)
    counts = count_parameters(model)
    for numel, printed, what in (
        (counts.total, published.total, published.total_of),
        (counts.active, published.active, published.active_of),
    ):
        digits = (
            len(printed.partition(".")[2]) if "e" not in printed else -2
        )  # 1T stands for tens of billions
        unit = 10.0**-digits
        off = counted(model, numel, what) / 1e9 - float(printed)
        assert (0 <= off < unit) if published.cut and off > unit / 2 else (abs(off) <= unit / 2)


# Random configurations.

widths = st.integers(1, 24)
flags = st.booleans()


@st.composite
def attention_sizes(draw: st.DrawFn, latent: bool = False, free_head_dim: bool = True) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads if latent else kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 6))
    config = {
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": heads * head_dim,
        "vocab_size": draw(st.integers(2, 40)),
        "tie_word_embeddings": draw(flags),
    }
    if free_head_dim and draw(flags):
        config["head_dim"] = 2 * draw(st.integers(1, 9))
    return config


def expert_sizes(count: str, width: str = "moe_intermediate_size") -> st.SearchStrategy[dict[str, Any]]:
    """Experts in two to four groups, of which one may be kept: top-k fits into it."""
    return st.integers(1, 3).flatmap(
        lambda chosen: st.integers(chosen, 5).map(
            lambda each: {count: 4 * each, "num_experts_per_tok": chosen, width: 2 * each + chosen}
        )
    )


windowed = {
    "use_sliding_window": flags,
    "sliding_window": st.integers(1, 64),
    "max_window_layers": st.integers(0, 5),
}
latent_optional = {
    "q_lora_rank": st.none() | widths,
    "kv_lora_rank": widths,
    "qk_nope_head_dim": widths,
    "qk_rope_head_dim": widths.map(lambda half: 2 * half),
    "v_head_dim": widths,
    "attention_bias": flags,
    "first_k_dense_replace": st.integers(0, 5),
    "n_shared_experts": st.integers(0, 3),
    "num_nextn_predict_layers": st.integers(0, 2),
}
routed = {"norm_topk_prob": flags, "router_aux_loss_coef": st.floats(0, 1)}
corrected = {"routed_scaling_factor": st.floats(0.5, 4), "norm_topk_prob": flags}


@st.composite
def merged(draw: st.DrawFn, /, *parts: Any, optional: dict[str, Any], **fixed: Any) -> dict[str, Any]:
    config: dict[str, Any] = dict(fixed)
    for part in parts:
        config |= draw(part)
    return config | draw(st.fixed_dictionaries({}, optional=optional))


dense_width = st.fixed_dictionaries({"intermediate_size": widths})
CONFIGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "llama": merged(
        attention_sizes(),
        dense_width,
        optional={"attention_bias": flags, "mlp_bias": flags},
        model_type="llama",
    ),
    "mistral": merged(
        attention_sizes(),
        dense_width,
        optional={"sliding_window": st.none() | st.integers(1, 64)},
        model_type="mistral",
    ),
    "qwen2": merged(attention_sizes(), dense_width, optional=windowed, model_type="qwen2"),
    "qwen3": merged(
        attention_sizes(), dense_width, optional={**windowed, "attention_bias": flags}, model_type="qwen3"
    ),
    "mixtral": merged(
        attention_sizes(),
        expert_sizes("num_local_experts", "intermediate_size"),
        optional={"sliding_window": st.none() | st.integers(1, 64), "router_aux_loss_coef": st.floats(0, 1)},
        model_type="mixtral",
    ),
    "qwen2_moe": merged(
        attention_sizes(),
        expert_sizes("num_experts"),
        dense_width,
        st.fixed_dictionaries({"shared_expert_intermediate_size": widths}),
        optional={
            **windowed,
            **routed,
            "qkv_bias": flags,
            "decoder_sparse_step": st.integers(1, 3),
            "mlp_only_layers": st.none() | st.lists(st.integers(0, 6), unique=True, max_size=3),
        },
        model_type="qwen2_moe",
    ),
    "qwen3_moe": merged(
        attention_sizes(),
        expert_sizes("num_experts") | expert_sizes("num_experts").map(lambda c: c | {"num_experts": 0}),
        dense_width,
        optional={
            **windowed,
            **routed,
            "attention_bias": flags,
            "decoder_sparse_step": st.integers(1, 3),
            "mlp_only_layers": st.none() | st.lists(st.integers(0, 6), unique=True, max_size=3),
        },
        model_type="qwen3_moe",
    ),
    "olmoe": merged(
        attention_sizes(free_head_dim=False),
        expert_sizes("num_experts", "intermediate_size"),
        optional={**routed, "attention_bias": flags, "clip_qkv": st.none()},
        model_type="olmoe",
    ),
    "gpt_oss": merged(
        attention_sizes(),
        expert_sizes("num_local_experts", "intermediate_size"),
        optional={
            "attention_bias": flags,
            "sliding_window": st.integers(1, 64),
            "router_aux_loss_coef": st.floats(0, 1),
        },
        model_type="gpt_oss",
    ),
    "deepseek_v2": merged(
        attention_sizes(latent=True, free_head_dim=False),
        expert_sizes("n_routed_experts"),
        dense_width,
        st.sampled_from(
            [
                {},
                {"topk_method": "greedy"},
                {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
            ]
        ),
        optional={**latent_optional, "routed_scaling_factor": st.floats(0.5, 4)},
        model_type="deepseek_v2",
    ),
    "deepseek_v3": merged(
        attention_sizes(latent=True, free_head_dim=False),
        expert_sizes("n_routed_experts"),
        dense_width,
        st.sampled_from([{"n_group": 1, "topk_group": 1}, {"n_group": 4, "topk_group": 1}]),
        optional={**latent_optional, **corrected},
        model_type="deepseek_v3",
    ),
    "glm4_moe": merged(
        attention_sizes(),
        expert_sizes("n_routed_experts"),
        dense_width,
        st.sampled_from([{}, {"n_group": 2, "topk_group": 2}]),
        optional={
            **corrected,
            "attention_bias": flags,
            "use_qk_norm": flags,
            "first_k_dense_replace": st.integers(0, 5),
            "n_shared_experts": st.integers(0, 3),
        },
        model_type="glm4_moe",
    ),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # no shared expert is one of width 0 there
@pytest.mark.parametrize("family", CONFIGS)
def test_random_configurations_have_the_parameters_of_transformers(family: str) -> None:
    @settings(max_examples=30, deadline=None)
    @given(CONFIGS[family])
    def same(config: dict[str, Any]) -> None:
        assert_same_parameters(config)
        assert_same_behaviour(config)

    same()


def assert_same_behaviour(config: dict[str, Any]) -> None:
    """What shapes do not show, against the attributes that the modules of transformers read."""
    transformers = pytest.importorskip("transformers")
    keys = {key: value for key, value in config.items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(config["model_type"], **keys)
    ours = model_from_config(config)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.partial_rotary_factor == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    for layer in range(ours.num_hidden_layers):
        kinds = getattr(theirs, "layer_types", None)
        slides = kinds is None or kinds[layer] == "sliding_attention"
        assert ours.window_of(layer) == (getattr(theirs, "sliding_window", None) if slides else None)
    if not ours.num_experts:
        return
    router, family = ours.router, config["model_type"]
    assert ours.num_experts_per_tok == theirs.num_experts_per_tok
    assert router.type == ("sigmoid" if family in ("deepseek_v3", "glm4_moe") else "softmax")
    assert router.correction_bias == (router.type == "sigmoid")
    always = {"mixtral": True, "gpt_oss": True, "deepseek_v2": False}
    assert router.normalize == always.get(family, getattr(theirs, "norm_topk_prob", None))
    assert router.scaling_factor == getattr(theirs, "routed_scaling_factor", 1.0)
    assert router.aux_loss == getattr(theirs, "router_aux_loss_coef", 0.0)
    grouped = router.type == "sigmoid" or getattr(theirs, "topk_method", "") == "group_limited_greedy"
    assert router.num_groups == (theirs.n_group if grouped else 1)
    assert router.num_limited_groups == (theirs.topk_group if grouped else 1)


MINIMAL: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 8},
    "mistral": {"intermediate_size": 8},
    "qwen2": {"intermediate_size": 8, "num_key_value_heads": 4},
    "qwen3": {"intermediate_size": 8, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8},
    "deepseek_v2": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "deepseek_v3": {
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 8,
        "num_key_value_heads": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 8,
    },
}


@pytest.mark.parametrize("family", MINIMAL)
def test_keys_left_out_have_the_defaults_of_transformers(family: str) -> None:
    config = {"model_type": family, **SIZES, **MINIMAL[family]}
    assert_same_parameters(config)
    assert_same_behaviour(config)


@pytest.mark.parametrize("max_window_layers", range(5))
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_windows_of_qwen_start_and_end_where_they_do_there(family: str, max_window_layers: int) -> None:
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": max_window_layers}
    assert_same_behaviour({"model_type": family, **SIZES, **MINIMAL[family], **window})


def test_layer_types_name_the_windows() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = {"model_type": "gpt_oss", **SIZES, **MINIMAL["gpt_oss"], "layer_types": kinds}
    assert_same_behaviour(config)
    assert model_from_config(config).sliding_window_layers == (1, 2)


@pytest.mark.parametrize("family", MINIMAL)
def test_sizes_left_out_are_asked_for(family: str) -> None:
    config = {"model_type": family, **SIZES, **MINIMAL[family]}
    needed = {*SIZES, *MINIMAL[family]} - {"num_key_value_heads"}
    for key in needed:
        with pytest.raises(InputError) as raised:
            model_from_config({name: value for name, value in config.items() if name != key})
        assert raised.value.key == f"model.{key}"
        assert raised.value.value == "missing"


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(MINIMAL) == set(families._FAMILIES) - set(HF_TYPE)


def test_correction_bias_is_a_buffer_of_transformers() -> None:
    """It is counted with the parameters on neither side."""
    model = hf_model(
        {"model_type": "deepseek_v3", **SIZES, **MINIMAL["deepseek_v3"], "first_k_dense_replace": 0}
    )
    assert any("e_score_correction_bias" in name for name, _ in model.named_buffers())
    assert not any("e_score_correction_bias" in name for name, _ in model.named_parameters())


# The catalogue.


@pytest.mark.parametrize("name", catalogue_models())
def test_catalogue_entries_name_their_source_and_read_back(name: str) -> None:
    source = catalogue_config(name)["_source"]
    assert source["repository"]
    assert source["file"]
    assert "as_carried_by" in source or "note" in source
    model = model_named(name)
    assert model.name == name
    written = json.loads(model.model_dump_json())
    assert read_model(written, Path()) == model


def test_catalogue_names_take_repositories_and_any_case() -> None:
    assert model_named("Qwen/Qwen3-30B-A3B") is model_named("qwen3-30b-a3b")
    assert model_named("MIXTRAL-8x7B") is model_named("mistralai/Mixtral-8x7B-v0.1")
    for alias, name in families._REPOSITORIES.items():
        assert model_named(alias).name == name


def test_one_model_reads_one_file() -> None:
    families._catalogue_model.cache_clear()
    model_named("olmoe-1b-7b")
    assert families._catalogue_model.cache_info().currsize == 1


@pytest.mark.parametrize(
    "name", ["qwen3-30b", "Qwen/Qwen3-30B-A3C", "", "../models/olmoe-1b-7b.json", "x" * 10_000]
)
def test_unknown_names_are_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError) as raised:
        read_model(name, Path())
    assert raised.value.key == "model"
    assert set(raised.value.nearest) <= set(catalogue_models())
    if name.lower().startswith("qw"):
        assert "qwen3-30b-a3b" in raised.value.nearest


# The `model` of a deployment file.


def test_config_files_are_found_from_the_folder(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", **SIZES, **MINIMAL["mixtral"]}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config, indent="\t"), "utf-8")
    model = read_model({"config": "tiny/config.json"}, tmp_path)
    assert model == read_model({"config": "tiny"}, tmp_path)
    assert model == read_model({"config": str(tmp_path / "tiny" / "config.json")}, Path("elsewhere"))
    assert model.name == "tiny"
    inline = read_model(config, tmp_path)
    assert inline == model.model_copy(update={"name": "inline"})
    assert read_model(inline, tmp_path) is inline


def test_an_architecture_alone_names_the_family() -> None:
    config = {"architectures": ["MixtralForCausalLM"], **SIZES, **MINIMAL["mixtral"]}
    assert model_from_config(config) == model_from_config({"model_type": "mixtral", **config})


def test_expert_counts_take_every_spelling() -> None:
    config = {"model_type": "mixtral", **SIZES, **MINIMAL["mixtral"]}
    expected = model_from_config(config)
    del config["num_local_experts"]
    for key in ("num_experts", "n_routed_experts"):
        assert model_from_config({**config, key: 4}) == expected


def broken(family: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": family, **SIZES, **MINIMAL[family], **changes}


BAD_CONFIGS: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "mamba"}, "model.model_type", "qwen3_moe"),
    ({"model_type": "qwen3_mo"}, "model.model_type", "(nearest: qwen3_moe"),
    ({"model_type": 3}, "model.model_type", "mixtral"),
    ({"model_type": None}, "model.model_type", "mixtral"),
    ({"model_type": 10**5000}, "model.model_type", "mixtral"),
    ({"architectures": ["BertModel"]}, "model.architectures", "MixtralForCausalLM"),
    ({"architectures": [["x"]]}, "model.architectures", "MixtralForCausalLM"),
    (broken("mixtral", num_local_experts=True), "model.num_local_experts", "whole number"),
    (broken("mixtral", num_local_experts=0), "model.num_local_experts", "between 1"),
    (broken("mixtral", num_local_experts=8, num_experts=4), "model.num_experts", "give one"),
    (broken("mixtral", num_experts_per_tok=5), "model.num_experts_per_tok", "nearest: 4"),
    (broken("mixtral", intermediate_size="8"), "model.intermediate_size", "nearest: 8"),
    (broken("mixtral", intermediate_size=-8), "model.intermediate_size", "between 1"),
    (broken("mixtral", hidden_size=float("nan")), "model.hidden_size", "whole number"),
    (broken("mixtral", num_hidden_layers=1e9), "model.num_hidden_layers", f"at most {MAX_LAYERS:,}"),
    (broken("gpt_oss", num_hidden_layers=10**9), "model.num_hidden_layers", f"at most {MAX_LAYERS:,}"),
    (broken("mixtral", num_attention_heads=7), "model.num_attention_heads", "divide hidden_size"),
    (broken("mixtral", num_key_value_heads=3), "model.num_key_value_heads", "nearest: 1, 2, 4"),
    (broken("mixtral", hidden_act="quick_gelu"), "model.hidden_act", "silu"),
    (broken("mixtral", tie_word_embeddings="false"), "model.tie_word_embeddings", "boolean"),
    (broken("mixtral", router_aux_loss_coef=-1), "model.router_aux_loss_coef", "negative"),
    (broken("mixtral", rms_norm_eps=0), "model.rms_norm_eps", "above 0"),
    (broken("mixtral", sliding_window=0), "model.sliding_window", "between 1"),
    (broken("gpt_oss", layer_types=["full_attention"]), "model.layer_types", "num_hidden_layers = 3"),
    (broken("gpt_oss", layer_types=["linear_attention"] * 3), "model.layer_types", "sliding_attention"),
    (broken("qwen3", use_sliding_window="no"), "model.use_sliding_window", "true or false"),
    (broken("qwen3", use_sliding_window=True, max_window_layers="x"), "model.max_window_layers", "whole"),
    (broken("qwen3_moe", norm_topk_prob=1), "model.norm_topk_prob", "boolean"),
    (broken("qwen3_moe", decoder_sparse_step=0), "model.decoder_sparse_step", "between 1"),
    (broken("qwen3_moe", mlp_only_layers=[0]), "model.intermediate_size", "dense layers"),
    (broken("qwen3_moe", mlp_only_layers="01"), "model.mlp_only_layers", "tuple"),
    (broken("olmoe", clip_qkv=8.0), "model.clip_qkv", "nearest: None"),
    (broken("olmoe", head_dim=8), "model.head_dim", "hidden_size"),
    (broken("deepseek_v2", moe_layer_freq=2), "model.moe_layer_freq", "nearest: 1"),
    (broken("deepseek_v2", moe_layer_freq=True), "model.moe_layer_freq", "nearest: 1"),
    (broken("deepseek_v2", moe_layer_freq=[1, 1, 1]), "model.moe_layer_freq", "nearest: 1"),
    (broken("deepseek_v2", scoring_func="sigmoid"), "model.scoring_func", "softmax"),
    (broken("deepseek_v2", norm_topk_prob=True), "model.norm_topk_prob", "False"),
    (broken("deepseek_v2", topk_method="noaux_tc"), "model.topk_method", "group_limited_greedy"),
    (broken("deepseek_v2", num_key_value_heads=4), "model.num_key_value_heads", "nearest: 8"),
    (broken("deepseek_v2", kv_lora_rank=None), "model.kv_lora_rank", "latent"),
    (broken("deepseek_v2", seq_aux=1), "model.seq_aux", "true or false"),
    (broken("deepseek_v3", scoring_func="softmax"), "model.scoring_func", "sigmoid"),
    (broken("deepseek_v3", n_group=3), "model.topk_group", "num_groups = 3"),
    (broken("deepseek_v3", n_group=5), "model.n_group", "nearest: 2, 4, 8"),
    (broken("deepseek_v3", topk_group=9), "model.topk_group", "at most"),
    (broken("deepseek_v3", num_experts_per_tok=9), "model.num_experts_per_tok", "nearest: 8"),
    (broken("deepseek_v3", aux_loss_alpha=-1), "model.aux_loss_alpha", "negative"),
    (broken("deepseek_v3", q_lora_rank=0), "model.q_lora_rank", "between 1"),
    (broken("glm4_moe", use_qk_norm="yes"), "model.use_qk_norm", "true or false"),
]


@pytest.mark.parametrize(("config", "key", "text"), BAD_CONFIGS)
def test_bad_configs_are_refused_by_key(config: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(InputError) as raised:
        read_model(config, Path())
    assert raised.value.key == key
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (3, "model"),
        (None, "model"),
        (["mixtral-8x7b"], "model"),
        ({"config": 3}, "model.config"),
        ({"config": ""}, "model.config"),
        ({"config": "config.json", "hidden_size": 3}, "model.hidden_size"),
    ],
)
def test_other_forms_are_refused(value: object, key: str) -> None:
    with pytest.raises(InputError) as raised:
        read_model(value, Path())
    assert raised.value.key == key


@pytest.mark.parametrize("given_path", ["missing.json", "a\0b", "empty", "list.json"])
def test_unreadable_config_files_are_refused(tmp_path: Path, given_path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("[1, 2]", "utf-8")
    with pytest.raises(InputError):
        read_model({"config": given_path}, tmp_path)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, -1, 4096, 1e9, float("nan"), "8", "full_attention", 2**53]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("read", [model_from_config, lambda config: read_model(config, Path())])
def test_junk_is_refused_in_words(read: Callable[[dict[str, Any]], Model]) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def refused_or_read(data: st.DataObject) -> None:
        config = catalogue_config(data.draw(st.sampled_from(catalogue_models())))
        for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
            config[key] = data.draw(junk)
        problem: InputError | None = None
        try:
            count_parameters(read(config))
        except InputError as error:
            problem = error
        assert problem is None or problem.key.startswith("model.")

    refused_or_read()
