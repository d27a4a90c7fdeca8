"""The transformer: dense and mixture-of-experts dimensions under their Hugging Face names."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, TypeGuard

from pydantic import AliasChoices, Field, StrictBool, model_validator

from meshwright.errors import InputError
from meshwright.files import Noun
from meshwright.layout import nearest_divisors
from meshwright.units import Count, CountOrZero, Number

MAX_LAYERS = 1024
MAX_EXPERTS = 65_536
MAX_WIDTH = 2**24
MAX_PARAMETERS = 1e18

Norm = Literal["rmsnorm", "layernorm"]
QkNorm = Literal["none", "head", "full"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class Router(Noun):
    """How tokens choose experts.

    `softmax` and `sigmoid` score independently per token; `gshard_top2` is the capacity-limited top-2 gate
    of GShard as FairSeq MoE runs it. The weights of the chosen experts are divided by their sum
    (`normalize`), then multiplied by `scaling_factor`. `bias` is a learned bias of the logits;
    `correction_bias` is added to the scores for the choice alone and is no parameter: no gradient moves it
    (DeepSeek-V3, arXiv:2412.19437 §2.1.2).

    With `num_groups` above 1 a token chooses within its `num_limited_groups` best groups of experts. A
    group's score is its best expert's under softmax (DeepSeek-V2, arXiv:2405.04434 §2.2.2) and the sum of
    its two best experts' under sigmoid (DeepSeek-V3). `capacity_factor` None means dropless.

    `aux_loss_scope`: the balance loss averages over each sequence, which no layout changes, or over each
    micro-batch of a data-parallel rank (`gshard_top2` always does). Of `gshard_top2` alone: how the second
    expert is chosen (fairseq's moe_second_expert_policy), whether weights are normalised before copies are
    dropped, and whether tokens with the surest gate are served first.
    """

    type: Literal["softmax", "sigmoid", "gshard_top2"] = "softmax"
    normalize: StrictBool = True
    bias: StrictBool = False
    correction_bias: StrictBool = False
    scaling_factor: Number = 1.0
    num_groups: Count = 1
    num_limited_groups: Count = 1
    capacity_factor: Number | None = None
    drop: Literal["probs", "position"] | None = None
    aux_loss: Number = 0.0
    aux_loss_scope: Literal["sequence", "batch"] = "sequence"
    z_loss: Number = 0.0
    second_expert: Literal["sampling", "random", "all"] = "sampling"
    normalize_before_dropping: StrictBool = False
    batch_prioritized: StrictBool = False

    @model_validator(mode="after")
    def _capacity_and_drop_agree(self) -> Router:
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise InputError(
                "capacity_factor", self.capacity_factor, "a capacity factor is above 0", [1.0, 1.25]
            )
        if self.drop is not None and self.capacity_factor is None:
            raise InputError(
                "drop", self.drop, "tokens are dropped only with a capacity_factor", ["capacity_factor: 1.25"]
            )
        for name in ("aux_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise InputError(name, getattr(self, name), "a loss coefficient is not negative", [0])
        if self.num_limited_groups > self.num_groups:
            rule = f"at most num_groups = {self.num_groups}"
            raise InputError("num_limited_groups", self.num_limited_groups, rule, [self.num_groups])
        return self


class Model(Noun):
    """Dimensions of a decoder-only transformer. Sizes are elements, counts are plain numbers.

    Attention is multi-head or grouped-query (`num_key_value_heads` < heads), or multi-head latent when
    `kv_lora_rank` is given. A layer is mixture-of-experts unless it is one of the first
    `first_k_dense_replace`, is named in `mlp_only_layers`, or is skipped by `decoder_sparse_step`.
    `sliding_window` limits attention in `sliding_window_layers`, or in every layer when none is named.
    `rope_theta` and `partial_rotary_factor` (the share of each head that is rotated) are those of plain
    rotary positions; stretched ones (YaRN and its like) are not described.
    """

    name: str = "inline"
    num_hidden_layers: Count = Field(
        validation_alias=AliasChoices("num_hidden_layers", "n_layer", "num_layers")
    )
    hidden_size: Count
    vocab_size: Count
    tie_word_embeddings: StrictBool = False
    norm: Norm = "rmsnorm"
    norm_eps: Number = Field(
        default=1e-6,
        validation_alias=AliasChoices("norm_eps", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    )
    position: Literal["rope", "learned", "none"] = "rope"
    max_position_embeddings: Count | None = None
    rope_theta: Number = 10_000.0
    partial_rotary_factor: Number = 1.0
    # attention
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    attention_bias: StrictBool = False
    attention_output_bias: StrictBool = False
    attention_sinks: StrictBool = False
    qk_norm: QkNorm = "none"
    sliding_window: Count | None = None
    sliding_window_layers: tuple[CountOrZero, ...] = ()
    q_lora_rank: Count | None = None
    kv_lora_rank: Count | None = None
    qk_nope_head_dim: Count | None = None
    qk_rope_head_dim: Count | None = None
    v_head_dim: Count | None = None
    # feed-forward
    gated: StrictBool = True
    hidden_act: Activation | None = None
    mlp_bias: StrictBool = False
    intermediate_size: Count | None = None
    first_k_dense_replace: CountOrZero = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[CountOrZero, ...] = ()
    # experts
    num_experts: CountOrZero = Field(
        default=0, validation_alias=AliasChoices("num_experts", "num_local_experts", "n_routed_experts")
    )
    num_experts_per_tok: CountOrZero = Field(
        default=0,
        validation_alias=AliasChoices("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k"),
    )
    moe_intermediate_size: Count | None = None
    n_shared_experts: CountOrZero = 0
    shared_expert_intermediate_size: Count | None = None
    shared_expert_gate: StrictBool = False
    expert_bias: StrictBool = False
    router: Router = Router()

    @model_validator(mode="before")
    @classmethod
    def _fill_what_follows(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        heads, hidden = filled.get("num_attention_heads"), filled.get("hidden_size")
        if _whole(heads):
            filled.setdefault("num_key_value_heads", heads)
        if (
            _whole(heads)
            and _whole(hidden)
            and filled.get("head_dim") is None
            and not filled.get("kv_lora_rank")
        ):
            if hidden % heads:
                rule = f"without head_dim, the heads must divide hidden_size = {hidden}"
                near = nearest_divisors(int(hidden), int(heads)) if hidden <= MAX_WIDTH else []
                raise InputError("num_attention_heads", heads, rule, near)
            filled["head_dim"] = hidden // heads
        if filled.get("hidden_act") is None:
            filled["hidden_act"] = "silu" if filled.get("gated", True) else "gelu"
        width = filled.get("moe_intermediate_size")
        shared = filled.get("n_shared_experts")
        if (
            shared
            and _whole(shared)
            and _whole(width)
            and filled.get("shared_expert_intermediate_size") is None
        ):
            filled["shared_expert_intermediate_size"] = shared * width
        return filled

    @model_validator(mode="after")
    def _dimensions_agree(self) -> Model:
        self._check_bounds()
        self._check_attention()
        self._check_positions()
        self._check_feed_forward()
        self._check_size()
        return self

    def _check_bounds(self) -> None:
        for name, limit in (
            ("num_hidden_layers", MAX_LAYERS),
            ("num_experts", MAX_EXPERTS),
            ("hidden_size", MAX_WIDTH),
            ("vocab_size", MAX_WIDTH),
            ("intermediate_size", MAX_WIDTH),
            ("moe_intermediate_size", MAX_WIDTH),
            ("shared_expert_intermediate_size", MAX_WIDTH),
            ("num_attention_heads", MAX_WIDTH),
            ("head_dim", MAX_WIDTH),
            ("max_position_embeddings", MAX_WIDTH),
            ("kv_lora_rank", MAX_WIDTH),
            ("q_lora_rank", MAX_WIDTH),
            ("v_head_dim", MAX_WIDTH),
            ("qk_nope_head_dim", MAX_WIDTH),
            ("qk_rope_head_dim", MAX_WIDTH),
        ):
            value = getattr(self, name)
            if value is not None and value > limit:
                raise InputError(name, value, f"at most {limit:,}", [limit])

    def _check_attention(self) -> None:
        if self.num_attention_heads % self.kv_heads:
            rule = f"key-value heads must divide num_attention_heads = {self.num_attention_heads}"
            near = nearest_divisors(self.num_attention_heads, self.kv_heads)
            raise InputError("num_key_value_heads", self.kv_heads, rule, near)
        if self.is_mla:
            for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) is None:
                    raise InputError(name, "missing", "latent attention (kv_lora_rank) needs it")
        if self.sliding_window_layers and self.sliding_window is None:
            raise InputError("sliding_window", "missing", "sliding_window_layers need its width in tokens")
        self._check_layer_numbers("sliding_window_layers")

    def _check_positions(self) -> None:
        if self.position == "learned" and self.max_position_embeddings is None:
            raise InputError("max_position_embeddings", "missing", "learned positions need it")
        for name, largest in (("norm_eps", 1.0), ("rope_theta", 1e12), ("partial_rotary_factor", 1.0)):
            value = getattr(self, name)
            if not 0 < value <= largest:
                raise InputError(
                    name, value, f"above 0 and at most {largest:g}", [Model.model_fields[name].default]
                )

    def _check_layer_numbers(self, name: str) -> None:
        for layer in getattr(self, name):
            if layer >= self.num_hidden_layers:
                last = self.num_hidden_layers - 1
                raise InputError(name, layer, f"layers are numbered from 0 to {last}", [last])

    def _check_feed_forward(self) -> None:
        self._check_layer_numbers("mlp_only_layers")
        if self.num_experts == 0:
            if self.intermediate_size is None:
                raise InputError("intermediate_size", "missing", "a dense model needs it")
            return
        if self.num_experts_per_tok == 0:
            rule = "a mixture of experts needs it"
            raise InputError("num_experts_per_tok", "missing", rule, [min(2, self.num_experts)])
        if self.num_experts_per_tok > self.num_experts:
            rule = f"a token cannot choose more than num_experts = {self.num_experts}"
            raise InputError("num_experts_per_tok", self.num_experts_per_tok, rule, [self.num_experts])
        if self.moe_intermediate_size is None:
            raise InputError("moe_intermediate_size", "missing", "a mixture of experts needs it")
        if self.router.type == "gshard_top2" and self.num_experts_per_tok != 2:
            raise InputError(
                "num_experts_per_tok", self.num_experts_per_tok, "a gshard_top2 router chooses two", [2]
            )
        if self.num_experts % self.router.num_groups:
            rule = f"groups must divide num_experts = {self.num_experts}"
            near = nearest_divisors(self.num_experts, self.router.num_groups)
            raise InputError("router.num_groups", self.router.num_groups, rule, near)
        reachable = self.num_experts // self.router.num_groups * self.router.num_limited_groups
        if self.router.num_groups > 1 and self.num_experts_per_tok > reachable:
            rule = f"the {self.router.num_limited_groups} groups that a token keeps hold {reachable} experts"
            raise InputError("num_experts_per_tok", self.num_experts_per_tok, rule, [reachable])
        if self.num_dense_layers and self.intermediate_size is None:
            raise InputError("intermediate_size", "missing", "the dense layers of this model need it")

    def _check_size(self) -> None:
        """Refuse what no count, held exactly by a float, could describe."""
        experts = (self.moe_intermediate_size or 0) * self.num_experts
        attention = self.num_attention_heads * max(self.qk_head_dim, self.value_head_dim)
        widest = max(experts, attention, self.intermediate_size or 0, self.shared_width)
        rough = 4.0 * self.num_hidden_layers * self.hidden_size * widest
        if rough > MAX_PARAMETERS:
            rule = f"with these widths the model has over {MAX_PARAMETERS:g} parameters"
            raise InputError("num_hidden_layers", self.num_hidden_layers, rule)

    @property
    def is_mla(self) -> bool:
        """Whether attention is multi-head latent (DeepSeek-V2, arXiv:2405.04434 §2.1)."""
        return self.kv_lora_rank is not None

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.num_experts > 0 and self.num_dense_layers < self.num_hidden_layers

    @property
    def kv_heads(self) -> int:
        """Key-value heads, equal to the query heads unless grouped."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        if self.is_mla:
            return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)
        return self.head_dim or 0

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return (self.v_head_dim or 0) if self.is_mla else (self.head_dim or 0)

    @property
    def shared_width(self) -> int:
        """Feed-forward width of all shared experts together; 0 without them."""
        return self.shared_expert_intermediate_size or 0

    @cached_property
    def dense_layers(self) -> frozenset[int]:
        """Layers (from 0) without experts."""
        named = frozenset(self.mlp_only_layers)
        return frozenset(
            layer
            for layer in range(self.num_hidden_layers)
            if self.num_experts == 0
            or layer < self.first_k_dense_replace
            or layer in named
            or (layer + 1) % self.decoder_sparse_step
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer (from 0) holds experts."""
        return layer not in self.dense_layers

    def layer_kind(self, layer: int) -> tuple[bool, bool]:
        """Whether a layer holds experts and whether its attention has a window: equal kinds, equal layers."""
        return self.is_moe_layer(layer), layer in self.sliding_window_layers

    @property
    def num_dense_layers(self) -> int:
        """Layers without experts."""
        return len(self.dense_layers)

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of this layer (from 0) sees at most, its own included; None: all before it."""
        named = self.sliding_window_layers
        return self.sliding_window if not named or layer in named else None


def _whole(value: object) -> TypeGuard[int]:
    """Whether a raw value is a usable positive whole number; wrong ones are reported by their own field."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value < 2**53
        and value == int(value)
    )
