"""Weights against transformers: tiny random models of each family, in memory and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.errors import InputError
from meshwright.families import model_from_config
from meshwright.ir.parameters import parameters
from meshwright.model import Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from meshwright.runtime.hugging_face import (  # noqa: E402
    Translated,
    from_hugging_face,
    open_weights,
    to_hugging_face,
)

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 24, "intermediate_size": 48, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 16, "mlp_only_layers": [1]},
    "qwen3_moe tied": {**EXPERTS, "num_experts": 4, "head_dim": 8, "tie_word_embeddings": True},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "head_dim": 8},
    "deepseek_v2": {**EXPERTS, **LATENT, "n_shared_experts": 2, "q_lora_rank": None},
    "deepseek_v3": {**EXPERTS, **LATENT, "n_group": 2, "topk_group": 1, "q_lora_rank": 12},
    "glm4_moe": {
        **EXPERTS,
        "n_routed_experts": 4,
        "use_qk_norm": True,
        "head_dim": 8,
        "attention_bias": True,
    },
    "glm4_moe plain": {**EXPERTS, "n_routed_experts": 4, "head_dim": 8, "n_shared_experts": 0},
    "llama": {"intermediate_size": 48},
    "mistral": {"intermediate_size": 48, "head_dim": 8},
    "qwen2": {"intermediate_size": 48, "tie_word_embeddings": True},
    "qwen3": {"intermediate_size": 48, "head_dim": 8},
}


def built(name: str) -> tuple[Model, Any]:
    """Our description of a configuration, and the model that transformers builds from it."""
    family = name.split()[0]
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **CONFIGS[name]})
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():  # norms, biases and buffers would else be all alike
            tensor.normal_()
    ours = model_from_config({"model_type": family, **SIZES, **CONFIGS[name]})
    return ours, theirs


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    shapes = {param.name: param.shape for param in parameters(model)}
    if model.router.correction_bias:
        for layer in range(model.num_hidden_layers):
            if model.is_moe_layer(layer):
                shapes[f"layers.{layer}.moe.router.correction_bias"] = (model.num_experts,)
    return shapes


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def of_width(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if tensor.numel()}


def untied(model: Model, state: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != "lm_head.weight" or not model.tie_word_embeddings}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_the_declaration(name: str) -> None:
    model, theirs = built(name)
    weights = from_hugging_face(model, theirs.state_dict())
    assert {key: tuple(tensor.shape) for key, tensor in weights.items()} == shapes_of(model)
    assert all(tensor.is_contiguous() for tensor in weights.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_equal_to_the_bit(name: str) -> None:
    model, theirs = built(name)
    state = untied(model, of_width(theirs.state_dict()))
    weights = from_hugging_face(model, theirs.state_dict())
    assert_equal(to_hugging_face(model, weights, "stacked"), state)
    assert_equal(from_hugging_face(model, to_hugging_face(model, weights)), weights)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_holds_the_same_and_is_written_the_same(name: str, tmp_path: Path) -> None:
    model, theirs = built(name)
    weights = from_hugging_face(model, theirs.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    opened = open_weights(tmp_path)
    assert shapes_of(opened.model) == shapes_of(model)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert_equal(from_hugging_face(opened.model, opened), weights)
    assert_equal(to_hugging_face(model, weights), of_width(dict(opened)))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe tied"])
def test_transformers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    model, theirs = built(name)
    weights = from_hugging_face(model, theirs.state_dict())
    theirs.config.save_pretrained(tmp_path)
    written = {key: tensor.contiguous() for key, tensor in to_hugging_face(model, weights).items()}
    safetensors_torch.save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(theirs).from_pretrained(tmp_path)
    assert_equal(dict(loaded.state_dict()), dict(theirs.state_dict()))
    assert_equal(from_hugging_face(model, open_weights(tmp_path)), weights)


def test_each_expert_computes_what_it_did() -> None:
    """Which half is the gate, and which way the matrices stand, by the modules' own results."""
    for name in ("mixtral", "qwen3_moe", "gpt_oss"):
        model, theirs = built(name)
        ours = from_hugging_face(model, theirs.state_dict())
        x_TH = torch.randn(5, model.hidden_size)
        prefix = "layers.0.moe.experts."
        gate, up, down = (ours[f"{prefix}{part}"] for part in ("gate", "up", "down"))
        experts = theirs.model.layers[0].mlp.experts
        for expert in range(model.num_experts):
            chosen = torch.full((5, 1), expert)
            expected = experts(x_TH, chosen, torch.ones(5, 1))
            g_TF, u_TF = x_TH @ gate[expert].T, x_TH @ up[expert].T
            if name == "gpt_oss":
                g_TF = (g_TF + ours[f"{prefix}gate_bias"][expert]).clamp(max=experts.limit)
                u_TF = (u_TF + ours[f"{prefix}up_bias"][expert]).clamp(-experts.limit, experts.limit)
                product = (u_TF + 1) * g_TF * torch.sigmoid(g_TF * experts.alpha)
                result = product @ down[expert].T + ours[f"{prefix}down_bias"][expert]
            else:
                result = (torch.nn.functional.silu(g_TF) * u_TF) @ down[expert].T
            assert (result - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_a_surplus_and_a_wrongly_shaped_tensor_are_named(name: str) -> None:
    model, theirs = built(name)
    weights = from_hugging_face(model, theirs.state_dict())
    for state in (untied(model, of_width(theirs.state_dict())), to_hugging_face(model, weights)):
        for lost in list(state)[::5]:
            without = {key: tensor for key, tensor in state.items() if key != lost}
            with pytest.raises(InputError) as caught:
                from_hugging_face(model, without)
            assert (caught.value.key, caught.value.value) == (lost, "missing")
            wrong = {**state, lost: torch.zeros(3, 1, 7)}
            with pytest.raises(InputError) as caught:
                from_hugging_face(model, wrong)
            assert (caught.value.key, caught.value.value) == (lost, [3, 1, 7])
        with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.extra\.weight: 'not of"):
            from_hugging_face(model, {**state, "model.layers.0.self_attn.extra.weight": torch.zeros(2)})
    for lost in list(weights)[::5]:
        with pytest.raises(InputError, match=f"{lost}: 'missing'"):
            to_hugging_face(model, {key: tensor for key, tensor in weights.items() if key != lost})
        with pytest.raises(InputError, match=f"{lost}: .3, 1, 7."):
            to_hugging_face(model, {**weights, lost: torch.zeros(3, 1, 7)})
    with pytest.raises(InputError, match="extra: 'not of the model'"):
        to_hugging_face(model, {**weights, "extra": torch.zeros(1)})


def test_a_tensor_in_two_spellings_is_refused() -> None:
    model, theirs = built("mixtral")
    both = {**theirs.state_dict(), "model.layers.0.block_sparse_moe.gate.weight": torch.zeros(4, 32)}
    with pytest.raises(InputError, match="a second time"):
        from_hugging_face(model, both)


def test_what_a_model_does_not_need_is_left() -> None:
    model, theirs = built("deepseek_v3")
    state = dict(theirs.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    further = {"model.layers.3.eh_proj.weight": torch.zeros(1), "model.layers.3.enorm.weight": torch.zeros(1)}
    assert from_hugging_face(model, {**state, **further}).keys() == shapes_of(model).keys()
    with pytest.raises(InputError, match=r"model\.layers\.3\.enorm\.weight"):
        from_hugging_face(model, {**state, "model.layers.3.enorm.weight": torch.zeros(1)})


def test_a_head_that_should_be_the_embedding_and_is_not() -> None:
    model, theirs = built("qwen3_moe tied")
    state = {**theirs.state_dict(), "lm_head.weight": torch.zeros(64, 32)}
    with pytest.raises(InputError, match=r"lm_head\.weight.*embedding"):
        from_hugging_face(model, state)


def test_quantised_weights_are_refused() -> None:
    model, theirs = built("gpt_oss")
    state = dict(theirs.state_dict())
    blocks = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    state[blocks] = state.pop("model.layers.0.mlp.experts.gate_up_proj")
    with pytest.raises(InputError, match=f"{blocks}: 'a quantised weight'"):
        from_hugging_face(model, state)


def test_models_of_no_family_are_refused() -> None:
    for field, value in (("gated", False), ("norm", "layernorm"), ("position", "learned")):
        model, _ = built("llama")
        other = Model.model_validate({**model.model_dump(), field: value, "max_position_embeddings": 64})
        with pytest.raises(InputError, match=rf"model\.{field}"):
            from_hugging_face(other, {})
        with pytest.raises(InputError, match=rf"model\.{field}"):
            to_hugging_face(other, {})


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    _, theirs = built("mixtral")
    theirs.save_pretrained(tmp_path)
    opened = open_weights(tmp_path)
    read: list[str] = []

    class Watched(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            read.append(name)
            return opened[name]

    translated = Translated(opened.model, Watched.fromkeys(opened))
    assert read == []
    assert len(translated) == len(shapes_of(opened.model))
    translated["layers.1.moe.experts.down"]
    assert read == [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]


def test_a_folder_without_its_files_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        open_weights(tmp_path / "nowhere")
    _, theirs = built("llama")
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no weights"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "must be JSON"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": "../up.safetensors"}}', "same folder"),
        ('{"weight_map": {"a": 3}}', "same folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no such file"),
    ],
)
def test_a_wrong_index_is_refused_in_words(index: str, said: str, tmp_path: Path) -> None:
    _, theirs = built("llama")
    theirs.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=said):
        open_weights(tmp_path)


def test_a_shard_that_lacks_its_tensor_is_named(tmp_path: Path) -> None:
    model, theirs = built("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    shards["model.norm.weight"] = shards["model.embed_tokens.weight"]
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match=r"model\.norm\.weight.*cannot be read from"):
        from_hugging_face(model, open_weights(tmp_path))
