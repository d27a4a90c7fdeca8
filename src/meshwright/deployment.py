"""The deployment file: one description of cluster, model, workload, layout and policy."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

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


class Deployment(Noun):
    """A deployment as a file states it: what is given is kept, what is missing is chosen later."""

    name: str = "deployment"
    cluster: Annotated[ClusterRequest | LocalRequest, BeforeValidator(read_cluster)]
    model: Model
    workload: Workload
    layout: LayoutRequest = LayoutRequest()
    policy: PolicyRequest = PolicyRequest()
    training: Training | None = None
    claims: Claims | None = None


def read_deployment(path: str | Path, overrides: Sequence[str] = ()) -> Deployment:
    """The deployment in a YAML file, with `--set` overrides. Raises InputError with the key's path."""
    document = apply_overrides(read_yaml(path), overrides)
    return deployment_from(document, Path(path).parent)


def deployment_from(document: dict[str, Any], folder: Path) -> Deployment:
    """A deployment from a mapping; files that it names are looked up from `folder`."""
    changed = dict(document)
    if "model" in changed:
        changed["model"] = read_model(changed["model"], folder)
    workload = changed.get("workload")
    if isinstance(workload, dict):
        length = workload.get("sequence_length")
        if isinstance(length, dict) and isinstance(length.get("histogram"), str):
            counts = read_length_histogram(folder / length["histogram"])
            changed["workload"] = {**workload, "sequence_length": {"counts": counts}}
    return decode(Deployment, changed)


def read_length_histogram(path: Path) -> list[tuple[int, int]]:
    """Sequence lengths and how often each occurs, from a file of `length,count` lines."""
    counts: list[tuple[int, int]] = []
    for number, row in enumerate(csv.reader(read_text(path).splitlines()), 1):
        if not row or row[0].strip().startswith("#") or (number == 1 and row[0].strip() == "length"):
            continue
        if len(row) != 2 or not all(cell.strip().isdecimal() and len(cell.strip()) < 16 for cell in row):
            raise InputError(
                f"{path} line {number}", ",".join(row), "a line holds length,count", ["4096,120"]
            )
        counts.append((int(row[0]), int(row[1])))
    if not counts:
        raise InputError(str(path), "empty", "a histogram has at least one line", ["4096,120"])
    return counts
