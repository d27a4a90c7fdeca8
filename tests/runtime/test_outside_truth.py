"""Whole models against transformers: the same weights give the same logits, loss, gradients and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshwright.deployment import deployment_from
from meshwright.families import model_from_config
from meshwright.model import Model
from meshwright.plan import Plan, resolve
from meshwright.verify import require_valid

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from meshwright.runtime.build import load_biases, values_of  # noqa: E402
from meshwright.runtime.data import IGNORED  # noqa: E402
from meshwright.runtime.hugging_face import from_hugging_face  # noqa: E402
from meshwright.runtime.layers import rms_norm  # noqa: E402
from meshwright.runtime.mesh import single_process  # noqa: E402
from meshwright.runtime.model import Stage  # noqa: E402
from meshwright.runtime.step import Trainer  # noqa: E402

BATCH, LENGTH, MICRO_BATCH = 4, 24, 2
LOGITS, LOSS, GRADIENT = 1e-5, 1e-6, 1e-4
"""Largest relative errors."""
SEEN = 1e-3
"""What a setting that is taken wrongly changes of the logits at the least."""

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "rms_norm_eps": 0.03,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "router_aux_loss_coef": 0.0,
}
MIXTRAL = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 48,
    "router_aux_loss_coef": 0.0,
}
OLMOE = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24, "router_aux_loss_coef": 0.0}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
GLM = {
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "head_dim": 16,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 1.7,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
}
SLIDING = {"use_sliding_window": True, "sliding_window": 7}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "mixtral sliding": {**MIXTRAL, "sliding_window": 7},
    "mixtral tied, one head of keys": {**MIXTRAL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3_moe tied": {**EXPERTS, "head_dim": 8, "norm_topk_prob": False, "tie_word_embeddings": True},
    "qwen3_moe biased": {**EXPERTS, "head_dim": 8, "attention_bias": True, "decoder_sparse_step": 2},
    "qwen2_moe": {**SHARED, "norm_topk_prob": False},
    "qwen2_moe normalised": {**SHARED, "norm_topk_prob": True},
    "olmoe": {**OLMOE, "norm_topk_prob": False},
    "olmoe normalised": {**OLMOE, "norm_topk_prob": True, "num_key_value_heads": 4},
    "glm4_moe": {**GLM, "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "glm4_moe plain": {**GLM, "n_shared_experts": 1, "norm_topk_prob": False},
    "llama": {"intermediate_size": 48, "attention_bias": True, "mlp_bias": True},
    "llama gelu": {"intermediate_size": 48, "hidden_act": "gelu", "tie_word_embeddings": True},
    "mistral": {"intermediate_size": 48, "head_dim": 16, "sliding_window": 7},
    "qwen2": {**SLIDING, "intermediate_size": 48, "max_window_layers": 1},
    "qwen3": {**SLIDING, "intermediate_size": 48, "head_dim": 8, "max_window_layers": 2},
}


def built(name: str) -> tuple[Model, Any]:
    """Our description of a configuration, and the model that transformers builds from it."""
    family = name.split()[0]
    keys = {**SIZES, **CONFIGS[name]}
    config = transformers.AutoConfig.for_model(family, **keys, attn_implementation="eager")
    config._experts_implementation = "eager"
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            if key.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1:
                tensor.normal_(0, 0.3)
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5)
    return model_from_config({"model_type": family, **keys}), theirs


def plan_of(
    model: Model, optimizer: str = "sgd", micro_batch_size: int = MICRO_BATCH, **training: Any
) -> Plan:
    document = {
        "cluster": {"local": 1},
        "model": model,
        "workload": {
            "global_batch_size": BATCH,
            "sequence_length": LENGTH,
            "precision": "fp32",
            "optimizer": optimizer,
        },
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "policy": {"engine": "native", "micro_batch_size": micro_batch_size},
        "training": training,
    }
    plan = resolve(deployment_from(document, Path()))
    require_valid(plan)
    return plan


def trainer_of(model: Model, theirs: Any, taken_for: Model | None = None, **settings: Any) -> Trainer:
    """A trainer of one process with the weights of their model, which may be taken for another of the same
    shapes."""
    weights = from_hugging_face(model, theirs.state_dict())
    plan = plan_of(taken_for or model, **settings)
    trainer = Trainer(plan, single_process(torch.device("cpu")), values_of(weights))
    load_biases([stage_of(trainer)], weights)
    return trainer


def stage_of(trainer: Trainer) -> Stage:
    return trainer.replica.stages[0]


def logits_of(trainer: Trainer, tokens_BS: Any, **more: Any) -> Any:
    """[B, S, V]."""
    with torch.no_grad():
        return stage_of(trainer).logits(tokens_BS, **more).transpose(0, 1)


def tokens_and_targets(seed: int = 5) -> tuple[Any, Any]:
    """A batch, and the next tokens; the last of a sequence has none, and some are ignored."""
    drawn = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(SIZES["vocab_size"], (BATCH, LENGTH), generator=drawn)
    targets_BS = torch.cat((tokens_BS[:, 1:], torch.full((BATCH, 1), IGNORED)), 1)
    targets_BS[0, 4:9] = IGNORED
    return tokens_BS, targets_BS


def their_loss(theirs: Any, tokens_BS: Any, targets_BS: Any) -> Any:
    """The loss as their model computes it; its labels are shifted there."""
    labels_BS = torch.cat((torch.full((BATCH, 1), IGNORED), targets_BS[:, :-1]), 1)
    return theirs(input_ids=tokens_BS, labels=labels_BS).loss


def relative_error(ours: Any, theirs: Any) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


def assert_gradients(trainer: Trainer, theirs: Any) -> None:
    """Gradients of every parameter against those of their model, under our names."""
    state = {**theirs.state_dict(), **{key: p.grad for key, p in theirs.named_parameters()}}
    model = trainer.plan.model
    if model.tie_word_embeddings:
        del state["lm_head.weight"]
    expected = from_hugging_face(model, state)
    held = {one.name: one.tensor.grad for one in trainer.replica.held}
    assert held.keys() == {key for key in expected if not key.endswith(".correction_bias")}
    errors = {key: relative_error(gradient, expected[key]) for key, gradient in held.items()}
    assert max(errors.values()) <= GRADIENT, {key: e for key, e in errors.items() if not e <= GRADIENT}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_theirs(name: str) -> None:
    model, theirs = built(name)
    tokens_BS, _ = tokens_and_targets()
    with torch.no_grad():
        expected = theirs(input_ids=tokens_BS).logits
    assert relative_error(logits_of(trainer_of(model, theirs), tokens_BS), expected) <= LOGITS


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_theirs(name: str) -> None:
    model, theirs = built(name)
    tokens_BS, targets_BS = tokens_and_targets()
    loss = their_loss(theirs, tokens_BS, targets_BS)
    loss.backward()
    trainer = trainer_of(model, theirs)
    ours = trainer.gradients(tokens_BS, targets_BS, {})
    assert float(ours) == pytest.approx(float(loss.detach()), rel=LOSS)
    assert_gradients(trainer, theirs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe tied", "olmoe", "llama"])
def test_training_with_adamw_goes_the_way_of_theirs(name: str) -> None:
    """Clipping, decay of matrices alone, and moments: six losses, and the weights after them."""
    model, theirs = built(name)
    training = {"learning_rate": 3e-3, "weight_decay": 0.2, "gradient_clip": 0.5, "epsilon": 1e-6}
    trainer = trainer_of(model, theirs, optimizer="adamw", **training)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    rest = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.2, betas=(0.9, 0.95), eps=1e-6)
    for step in range(6):
        tokens_BS, targets_BS = tokens_and_targets(step % 2)
        loss = their_loss(theirs, tokens_BS, targets_BS)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        result = trainer.step(tokens_BS, targets_BS)
        assert float(result.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert result.outcome.grad_norm == pytest.approx(float(norm), rel=1e-4)
    after = from_hugging_face(model, theirs.state_dict())
    for one in trainer.replica.held:
        assert relative_error(one.tensor.detach(), after[one.name]) <= 1e-4, one.name


def test_the_balance_loss_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs takes all layers together, and is k where each of k choices is balanced, ours 1: one layer, one
    micro-batch, k times the coefficient."""
    keys = {"num_hidden_layers": 1, "router_aux_loss_coef": 0.3, "output_router_logits": True}
    monkeypatch.setitem(CONFIGS, "mixtral", {**MIXTRAL, **keys})
    model, theirs = built("mixtral")
    router = model.router.model_copy(update={"aux_loss": model.num_experts_per_tok * 0.3})
    as_theirs = model.model_copy(update={"router": router})
    tokens_BS, targets_BS = tokens_and_targets()
    their_loss(theirs, tokens_BS, targets_BS).backward()
    trainer = trainer_of(model, theirs, as_theirs, micro_batch_size=BATCH)
    trainer.gradients(tokens_BS, targets_BS, {})
    assert_gradients(trainer, theirs)
    assert float(trainer.replica.stages[0].layers["0"].moe.balance) > 0.1


PIECES = ((5, 11, 8), (24,), (1, 2, 3, 9), (7, 13))
"""Lengths of the documents of each sequence; what is left is padding."""


def packed() -> tuple[Any, Any]:
    """Positions and documents [B, S] of sequences that hold `PIECES`."""
    positions_BS = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    documents_BS = torch.full((BATCH, LENGTH), -1)
    for row, lengths in enumerate(PIECES):
        start = 0
        for number, length in enumerate(lengths):
            positions_BS[row, start : start + length] = torch.arange(length)
            documents_BS[row, start : start + length] = number
            start += length
    return positions_BS, documents_BS


@pytest.mark.parametrize("name", ["mixtral", "mixtral sliding", "qwen3_moe", "qwen2_moe", "olmoe", "qwen3"])
def test_packed_documents_know_nothing_of_each_other(name: str) -> None:
    """Logits of each document are those of their model for it alone."""
    model, theirs = built(name)
    tokens_BS, _ = tokens_and_targets()
    positions_BS, documents_BS = packed()
    trainer = trainer_of(model, theirs)
    ours = logits_of(trainer, tokens_BS, positions=positions_BS, documents=documents_BS)
    for row, lengths in enumerate(PIECES):
        for number in range(len(lengths)):
            here = documents_BS[row] == number
            alone = tokens_BS[row, here].unsqueeze(0)
            with torch.no_grad():
                expected = theirs(input_ids=alone).logits[0]
            assert relative_error(ours[row, here], expected) <= LOGITS
            assert relative_error(logits_of(trainer, alone)[0], expected) <= LOGITS


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "llama"])
def test_gradients_of_packed_documents_are_those_of_documents_alone(name: str) -> None:
    model, theirs = built(name)
    tokens_BS, _ = tokens_and_targets()
    positions_BS, documents_BS = packed()
    targets_BS = torch.full((BATCH, LENGTH), IGNORED)
    total, count = 0.0, 0
    for row, lengths in enumerate(PIECES):
        for number, length in enumerate(lengths):
            here = (documents_BS[row] == number).nonzero().flatten()
            targets_BS[row, here[:-1]] = tokens_BS[row, here[1:]]
            logits_SV = theirs(input_ids=tokens_BS[row, here].unsqueeze(0)).logits[0]
            wanted = targets_BS[row, here[:-1]]
            total = total + torch.nn.functional.cross_entropy(logits_SV[:-1], wanted, reduction="sum")
            count += length - 1
    loss = total / count
    loss.backward()
    trainer = trainer_of(model, theirs)
    extra = {"positions": positions_BS, "documents": documents_BS}
    assert float(trainer.gradients(tokens_BS, targets_BS, extra)) == pytest.approx(
        float(loss.detach()), rel=LOSS
    )
    assert_gradients(trainer, theirs)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "eps": ("mixtral", {"norm_eps": 1e-6}),
    "eps of heads": ("qwen3", {"norm_eps": 1e-6}),
    "theta": ("mixtral", {"rope_theta": 10_000.0}),
    "share of a head": ("glm4_moe", {"partial_rotary_factor": 1.0}),
    "positions": ("llama", {"position": "none"}),
    "width of the window": ("mixtral sliding", {"sliding_window": 8}),
    "layers that slide": ("qwen2", {"sliding_window_layers": (2,)}),
    "activation": ("llama gelu", {"hidden_act": "silu"}),
    "experts of a token": ("mixtral", {"num_experts_per_tok": 3}),
}
"""A model, and a setting that it does not have."""
WRONG_ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "normalised": ("qwen2_moe", {"normalize": True}),
    "not normalised": ("qwen3_moe", {"normalize": False}),
    "scaled": ("glm4_moe", {"scaling_factor": 1.0}),
    "groups": ("glm4_moe", {"num_groups": 1, "num_limited_groups": 1}),
}


@pytest.mark.parametrize("what", [*WRONG, *WRONG_ROUTERS])
def test_a_setting_taken_wrongly_would_be_seen(what: str) -> None:
    """The same weights under one other setting: these models tell each setting from its neighbours."""
    name, change = (WRONG | WRONG_ROUTERS)[what]
    model, theirs = built(name)
    if what in WRONG_ROUTERS:
        change = {"router": model.router.model_copy(update=change)}
    other = model.model_copy(update=change)
    tokens_BS, _ = tokens_and_targets()
    right, wrong = trainer_of(model, theirs), trainer_of(model, theirs, taken_for=other)
    assert relative_error(logits_of(wrong, tokens_BS), logits_of(right, tokens_BS)) > SEEN


@pytest.mark.parametrize(("kind", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_norm_and_its_gradients_are_torchs(kind: Any, error: float) -> None:
    """In each type against torch's own in FP64, on rows that do not lie one after another."""
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 48, generator=drawn, dtype=torch.float64)[..., ::2].to(kind)
    weight, gradient = (torch.randn(shape, generator=drawn).to(kind) for shape in ((24,), (5, 7, 24)))
    given = x.detach().requires_grad_(), weight.detach().requires_grad_()
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    ours = rms_norm(*given, 0.1)
    theirs = torch.nn.functional.rms_norm(wide[0], (24,), wide[1], 0.1)
    ours.backward(gradient)
    theirs.backward(gradient.double())
    assert (ours.dtype, given[0].grad.dtype) == (kind, kind)
    assert relative_error(ours.detach().double(), theirs.detach()) <= error
    for one, other in zip(given, wide, strict=True):
        assert relative_error(one.grad.double(), other.grad) <= error
