"""What each engine does differently, kept as data with a source for every fact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from meshwright.files import Noun, parse_yaml
from meshwright.policy import Dispatcher, EngineName, EngineSettings, Policy, ScheduleName, ZeroStage
from meshwright.units import Bytes, Count, Share
from meshwright.workload import Precision

ValueT = TypeVar("ValueT")
Reduction = Literal["each_micro_batch", "once_per_step"]
ExpertOverlap = Literal["none", "interleaved", "dual_pipe"]
"""Where expert communication runs beside another micro-batch's compute: nowhere; without a pipeline or under
interleaving; under DualPipeV."""


class Fact(BaseModel, Generic[ValueT]):
    """One fact about an engine, with where it is known from; an assumption's source begins `assumed:`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: ValueT
    source: str

    @property
    def is_assumed(self) -> bool:
        """Whether no source but a judgement stands behind the fact."""
        return self.source.startswith("assumed:")


class LogitBytes(Noun):
    """Bytes per logit: kept from forward to backward, and the most at once (the kept ones included), where
    each rank has all of a token's logits and where tp divides them."""

    kept: Count
    peak: Count
    divided_peak: Count


class Engine(Noun):
    """Facts of one engine.

    Bytes are per parameter or per rank; the booleans say which tensors a layer keeps for backward (see
    `ir/blocks.py`); the lists say what the engine runs at all. `reduces_gradients` is for ZeRO-2 and 3
    without a pipeline: with one, gradients add up over the micro-batches and are reduced once.
    `selective` names what selective recompute repeats: classes of ops, Megatron's modules, or `per_op` (see
    `ir/recompute.py`). `slack` is a share of all that tensors hold.
    """

    title: str
    gradient_bytes: Fact[Count]
    moment_bytes: Fact[Count]
    reduces_gradients: Fact[Reduction]
    master_in_parameter: Fact[bool]
    saves_gathered_input: Fact[bool]
    fused_activation: Fact[bool]
    probs_before_down: Fact[bool]
    fp8_inputs: Fact[bool]
    placeholder_gradients: Fact[bool]
    eager_gradients: Fact[bool]
    gradient_shares_apart: Fact[bool]
    retains_graph: Fact[bool]
    receives_ahead: Fact[bool]
    places_every_copy: Fact[bool]
    loss: Fact[LogitBytes]
    fused_loss: Fact[LogitBytes]
    vocabulary_multiple: Fact[Count]
    partitions_sends: Fact[bool]
    selective: Fact[tuple[str, ...]]
    etp_follows_tp: Fact[bool]
    expert_overlap: Fact[ExpertOverlap]
    context: Fact[Bytes]
    slack: Fact[Share]
    schedules: tuple[ScheduleName, ...]
    dispatchers: tuple[Dispatcher, ...]
    zero_stages: tuple[ZeroStage, ...]
    max_cp: Count
    latent_attention: bool
    precisions: tuple[Precision, ...]

    def assumptions(self) -> dict[str, str]:
        """The facts that are assumed, with their reason."""
        facts = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: f.source for name, f in facts.items() if isinstance(f, Fact) and f.is_assumed}


@cache
def engines() -> Mapping[str, Engine]:
    """Every engine by name."""
    text = package_files("meshwright").joinpath("catalog/engines.yaml").read_text("utf-8")
    return {name: Engine.model_validate(entry) for name, entry in parse_yaml(text, "engines.yaml").items()}


def engine_named(name: EngineName) -> Engine:
    """The facts of one engine."""
    return engines()[name]


def engine_of(policy: Policy) -> Engine:
    """The facts of a policy's engine, with what its settings change."""
    return _as_set(policy.engine, policy.settings)


_FLOAT_BYTES = {"fp32": 4, "bf16": 2}


@cache
def _as_set(name: EngineName, settings: EngineSettings) -> Engine:
    engine, stated = engine_named(name), "stated in policy.settings"
    changed: dict[str, object] = {}
    if settings.gradients is not None:
        changed["gradient_bytes"] = Fact[Count](value=_FLOAT_BYTES[settings.gradients], source=stated)
    if settings.moments is not None:
        changed["moment_bytes"] = Fact[Count](value=_FLOAT_BYTES[settings.moments], source=stated)
    if settings.loss == "fused":
        changed["loss"] = engine.fused_loss
    if settings.recompute_modules is not None:
        changed["selective"] = Fact[tuple[str, ...]](value=settings.recompute_modules, source=stated)
    return engine.model_copy(update=changed) if changed else engine


_SETTING_FACTS = {
    "gradients": "gradient_bytes",
    "moments": "moment_bytes",
    "loss": "loss",
    "recompute_modules": "selective",
}
"""The engine's fact that each setting changes."""


def unknown_settings(name: EngineName, settings: EngineSettings) -> dict[str, str]:
    """Settings that an engine does not have, each with what it does instead; those that state what it does
    anyway are known. The native engine has none."""
    if name != "native" or settings == EngineSettings():
        return {}
    usual, asked = engine_named(name), _as_set(name, settings)
    pairs = {key: (getattr(usual, fact), getattr(asked, fact)) for key, fact in _SETTING_FACTS.items()}
    return {key: does.source for key, (does, stated) in pairs.items() if stated.value != does.value}
