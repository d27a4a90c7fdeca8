"""Deployments that differ from a given one: with more of it fixed, or on another number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.cluster import ClusterRequest
from meshwright.deployment import Deployment, deployment_from
from meshwright.errors import InputError
from meshwright.files import apply_overrides, decode
from meshwright.gpus import gpu_named, machine_of
from meshwright.layout import LayoutRequest
from meshwright.policy import PolicyRequest

_LONGEST = 400
USUAL_BATCH, USUAL_LENGTH = 1024, 4096
"""Sequences per step and tokens per sequence where only a model and GPUs are named."""


def described(
    model: str,
    gpu: str,
    num_gpus: int,
    batch: int | None = None,
    length: int | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Deployment, dict[str, str]]:
    """A deployment of nothing but a model and GPUs of the catalogue, with the values taken for the rest.
    Raises InputError."""
    per_node = machine_of(gpu_named(gpu).name)
    size = per_node.gpus_per_node if per_node else num_gpus
    if num_gpus < 1 or (num_gpus > size and num_gpus % size):
        near = [n for n in (num_gpus // size * size, -(-num_gpus // size) * size) if n > 0]
        raise InputError("--gpus", num_gpus, f"whole nodes of {size} GPUs, or a part of one", near)
    taken = {}
    if batch is None:
        taken["workload.global_batch_size"] = f"{USUAL_BATCH}: not stated (--batch)"
    if length is None:
        taken["workload.sequence_length"] = f"{USUAL_LENGTH}: not stated (--seq)"
    cluster: dict[str, Any] = {"nodes": max(1, num_gpus // size), "gpu": gpu}
    if num_gpus < size:
        cluster["gpus_per_node"] = num_gpus
    document = {
        "name": f"{model}-{num_gpus}",
        "cluster": cluster,
        "model": model,
        "workload": {
            "global_batch_size": USUAL_BATCH if batch is None else batch,
            "sequence_length": USUAL_LENGTH if length is None else length,
        },
    }
    return deployment_from(apply_overrides(document, overrides), Path()), taken


def parse_choices(text: str, key: str = "--explain") -> dict[str, Any]:
    """What `tp=8,pp=4,recompute=full` fixes: values by key, `layout.` and `policy.` put before each. Raises
    InputError."""
    found: dict[str, Any] = {}
    example = ["tp=8,pp=4", "recompute=full,micro_batch_size=2"]
    if len(text) > _LONGEST:
        raise InputError(key, text, f"at most {_LONGEST} characters", example)
    for part in text.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign or not name or not value:
            raise InputError(key, part.strip(), "each choice is written key=value", example)
        full = _full_name(name.strip(), key)
        if full in found:
            raise InputError(key, full, "stands twice; keep one")
        section, _, last = full.partition(".")
        found[full] = apply_overrides({}, [f"{full}={value.strip()}"])[section][last]
    return found


def _full_name(name: str, key: str) -> str:
    prefix, dot, last = name.rpartition(".")
    for part, request in (("layout", LayoutRequest), ("policy", PolicyRequest)):
        if last in request.model_fields and (not dot or prefix == part):
            return f"{part}.{last}"
    near = [*LayoutRequest.model_fields, *PolicyRequest.model_fields]
    raise InputError(key, name, "no key of a layout or a policy", near)


def fixing(deployment: Deployment, choices: dict[str, Any]) -> Deployment:
    """The deployment with these choices fixed, whatever it said of them; None leaves a key open. Raises
    InputError for values that a layout or a policy cannot have."""
    update = {}
    for part, noun in (("layout", LayoutRequest), ("policy", PolicyRequest)):
        given = getattr(deployment, part).model_dump(exclude_none=True)
        mine = {key.partition(".")[2]: v for key, v in choices.items() if key.startswith(part)}
        merged = {key: value for key, value in {**given, **mine}.items() if value is not None}
        update[part] = decode(noun, merged, part)
    return deployment.model_copy(update=update)


def fixed_keys(deployment: Deployment) -> list[str]:
    """The keys of layout and policy that a deployment fixes."""
    return [
        f"{part}.{key}"
        for part in ("layout", "policy")
        for key in getattr(deployment, part).model_dump(exclude_none=True)
    ]


def on_gpus(deployment: Deployment, num_gpus: int, key: str) -> Deployment:
    """The deployment on another number of GPUs: whole nodes, or a part of one. A fixed dp is left open, as it
    follows from the GPUs. Raises InputError for a number that is neither."""
    cluster = deployment.cluster
    if not isinstance(cluster, ClusterRequest):
        raise InputError(key, num_gpus, "the processes of a local cluster are those of this machine")
    per_node = cluster.resolve()[0].gpus_per_node
    if num_gpus < 1 or (num_gpus > per_node and num_gpus % per_node):
        near = [n for n in (num_gpus // per_node * per_node, -(-num_gpus // per_node) * per_node) if n > 0]
        raise InputError(key, num_gpus, f"whole nodes of {per_node} GPUs, or a part of one", near)
    nodes = max(1, num_gpus // per_node)
    changed = cluster.model_copy(update={"nodes": nodes, "gpus_per_node": min(per_node, num_gpus)})
    open_ = fixing(deployment, {"layout.dp": None})
    return open_.model_copy(update={"cluster": changed})
