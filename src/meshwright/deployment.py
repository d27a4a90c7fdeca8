"""The deployment file: one description of cluster, model, workload, layout and policy."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

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


class Training(Noun):
    """How the model is trained; `warmup_steps` 0 means a constant learning rate."""

    steps: Count = 100
    learning_rate: Number = 3e-4
    warmup_steps: CountOrZero = 0
    weight_decay: Number = 0.1
    gradient_clip: Number = 1.0
    seed: CountOrZero = 0
    data: str | None = None
    tokenizer: str = "bytes"


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
