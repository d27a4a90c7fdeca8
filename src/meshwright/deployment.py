"""The deployment file: one description of cluster, model, workload, layout and policy."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from meshwright.claims import Claims
from meshwright.cluster import ClusterRequest, LocalRequest, read_cluster
from meshwright.errors import InputError
from meshwright.families import read_model
from meshwright.files import Noun, apply_overrides, decode, read_text, read_yaml
from meshwright.layout import LayoutRequest
from meshwright.model import Model
from meshwright.policy import PolicyRequest
from meshwright.units import Count, CountOrZero, Number
from meshwright.workload import Workload

PLAN_KEYS = ("digest", "defaults", "predictions")
"""What a plan's file holds beyond a deployment's."""


class LossScale(Noun):
    """Dynamic loss scaling under fp16 (Micikevicius et al., arXiv:1710.03740 §3.2).

    The scale doubles after `window` steps without overflow. An overflow skips the step; after `hysteresis` of
    them it halves the scale, never below `minimum`.
    """

    initial: Number = 65_536.0
    window: Count = 1000
    hysteresis: Count = 2
    minimum: Number = 1.0

    @model_validator(mode="after")
    def _above_nothing(self) -> LossScale:
        for name, least in (("minimum", 0.0), ("initial", self.minimum)):
            value = getattr(self, name)
            if value <= 0 or value < least:
                raise InputError(name, value, f"above 0 and at least {least:g}", [max(least, 1.0)])
        return self


class Training(Noun):
    """How the model is trained.

    The learning rate rises over `warmup_steps`, then falls along a cosine to `min_learning_rate` at the last
    step; with `warmup_steps` 0 it is constant. `beta1`, `beta2` and `epsilon` are AdamW's, `momentum` is
    SGD's. Weight decay (decoupled under AdamW) spares norms and biases. `gradient_clip` 0 clips nothing.
    `router_bias_rate` is how far a router's correction bias moves in a step. `data` is a file
    of text, JSON lines or Parquet, or a dataset's folder; without it a corpus that Python brings along.
    Documents are cut to the longest sequence of the workload and `packed` into sequences of that length,
    none attending to another, or `bucketed`: padded to one of a few lengths.
    """

    steps: Count = 100
    learning_rate: Number = 3e-4
    min_learning_rate: Number = 0.0
    warmup_steps: CountOrZero = 0
    weight_decay: Number = 0.1
    beta1: Number = 0.9
    beta2: Number = 0.95
    epsilon: Number = 1e-8
    momentum: Number = 0.0
    gradient_clip: Number = 1.0
    router_bias_rate: Number = 0.001
    loss_scale: LossScale = LossScale()
    seed: CountOrZero = 0
    data: str | None = None
    tokenizer: str = "bytes"
    documents: Literal["packed", "bucketed"] = "packed"

    @model_validator(mode="after")
    def _within_bounds(self) -> Training:
        for name in (
            "learning_rate",
            "min_learning_rate",
            "weight_decay",
            "gradient_clip",
            "router_bias_rate",
        ):
            if getattr(self, name) < 0:
                raise InputError(name, getattr(self, name), "not negative", [0])
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "at least 0 and below 1", [0.9])
        if self.epsilon <= 0:
            raise InputError("epsilon", self.epsilon, "above 0", [1e-8])
        if self.min_learning_rate > self.learning_rate:
            rule = f"at most learning_rate = {self.learning_rate:g}"
            raise InputError("min_learning_rate", self.min_learning_rate, rule, [0.0])
        return self


class ConfigFile(Noun):
    """A model given as a Hugging Face `config.json`, by its path from the deployment file."""

    config: str


class HuggingFaceConfig(BaseModel):
    """A model given as the content of a Hugging Face `config.json`; its family says which keys it has."""

    model_config = ConfigDict(extra="allow")
    model_type: str


_CLUSTER_FORMS = ClusterRequest | LocalRequest | Literal["local"]
# What editors accept under `model`; `read_model` has turned it into a Model before pydantic sees it.
_MODEL_FORMS = str | ConfigFile | HuggingFaceConfig | Model


def _as_it_is(value: object) -> object:
    return value


ModelInFile = Annotated[Model, BeforeValidator(_as_it_is, json_schema_input_type=_MODEL_FORMS)]


class Placement(Noun):
    """What groups need of a deployment's file: a cluster and a layout. The rest may stand there too."""

    name: str = "deployment"
    cluster: Annotated[
        ClusterRequest | LocalRequest,
        BeforeValidator(read_cluster, json_schema_input_type=_CLUSTER_FORMS),
    ]
    model: ModelInFile | None = None
    workload: Workload | None = None
    layout: LayoutRequest = LayoutRequest()
    policy: PolicyRequest = PolicyRequest()
    training: Training | None = None
    claims: Claims | None = None


class Deployment(Placement):
    """A deployment as a file states it: what is given is kept, what is missing is chosen later."""

    model: ModelInFile
    workload: Workload


PlacementT = TypeVar("PlacementT", bound=Placement)


def read_placement(path: str | Path, noun: type[PlacementT], overrides: Sequence[str] = ()) -> PlacementT:
    """A placement or a whole deployment in a YAML file, with `--set` overrides. Raises InputError with the
    key's path."""
    document = read_yaml(path)
    if document.get("cluster") == "local":  # so that an override has a mapping to change
        document["cluster"] = {"local": os.cpu_count() or 1}
    for key in PLAN_KEYS:  # a plan is a deployment with every field resolved, and may stand for one
        document.pop(key, None)
    return _from(noun, apply_overrides(document, overrides), Path(path).parent)


def read_deployment(path: str | Path, overrides: Sequence[str] = ()) -> Deployment:
    """The deployment in a YAML file, with `--set` overrides. Raises InputError with the key's path."""
    return read_placement(path, Deployment, overrides)


def deployment_from(document: dict[str, Any], folder: Path) -> Deployment:
    """A deployment from a mapping; files that it names are looked up from `folder`."""
    return _from(Deployment, document, folder)


def _from(noun: type[PlacementT], document: dict[str, Any], folder: Path) -> PlacementT:
    changed = dict(document)
    cluster = changed.get("cluster")
    if isinstance(cluster, dict) and isinstance(cluster.get("calibration"), str):
        changed["cluster"] = {**cluster, "calibration": str(folder / cluster["calibration"])}
    if "model" in changed:
        changed["model"] = read_model(changed["model"], folder)
    workload = changed.get("workload")
    if isinstance(workload, dict):
        routing, length = workload.get("routing"), workload.get("sequence_length")
        if isinstance(length, dict) and isinstance(length.get("histogram"), str):
            counts = read_counts(folder / length["histogram"], ("length", "count"))
            changed["workload"] = workload = {**workload, "sequence_length": {"counts": counts}}
        if isinstance(routing, dict) and isinstance(routing.get("histogram"), str):
            tokens = read_counts(folder / routing["histogram"], ("layer", "expert", "tokens"))
            changed["workload"] = {**workload, "routing": {"tokens": tokens}}
    return decode(noun, changed)


def read_counts(path: Path, columns: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Whole numbers from a file of comma-separated lines, one per column; a heading may stand first."""
    rows: list[tuple[int, ...]] = []
    form = ",".join(columns)
    for number, cells in enumerate(csv.reader(read_text(path).splitlines()), 1):
        words = [cell.strip() for cell in cells]
        if not words or words[0].startswith("#") or (number == 1 and words == list(columns)):
            continue
        if len(words) != len(columns) or not all(re.fullmatch(r"[0-9]{1,15}", word) for word in words):
            raise InputError(f"{path} line {number}", ",".join(cells), f"a line holds {form}", [form])
        rows.append(tuple(int(word) for word in words))
    if not rows:
        raise InputError(str(path), "empty", f"at least one line of {form}")
    return rows
