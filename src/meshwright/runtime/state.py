"""What a checkpoint holds: weights and moments in FP32 by name, biases, and where everything stood."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from meshwright.errors import InputError
from meshwright.ir.sharding import local_shape
from meshwright.plan import Plan
from meshwright.runtime import checkpoint
from meshwright.runtime.checkpoint import Pieces, flat_pieces, whole
from meshwright.runtime.data import DataStream
from meshwright.runtime.shares import Share
from meshwright.runtime.step import Trainer


def tensors(trainer: Trainer) -> dict[str, Pieces]:
    """Everything of a trainer that is divided over ranks: `weights.NAME`, one entry for each moment of the
    optimizer, and the routers' biases. Pieces are views, so that loading fills the trainer."""
    state: dict[str, Pieces] = {}
    for share in trainer.replica.store.shares:
        moments = trainer.optimizer.moments[id(share)]
        for kind, flat in {"weights": share.master, **moments}.items():
            state[f"{kind}.{share.held.name}"] = _pieces(trainer.plan, share, flat)
    for number, moe in trainer.moe_layers():
        if moe.router.correction_bias is not None:
            state[f"biases.layers.{number}.moe.router.correction_bias"] = whole(moe.router.correction_bias)
    return state


def _pieces(plan: Plan, share: Share, flat: Tensor) -> Pieces:
    param = share.held.param
    shape = local_shape(param, plan.layout)
    return flat_pieces(share.held.slice.ranges, flat, share.start, share.stop, param.shape, shape)


def save(trainer: Trainer, stream: DataStream, folder: Path, keep: int | None = None) -> Path:
    """Write a checkpoint of the step that was last done. Every rank calls it. Raises MeshwrightError."""
    extra = {
        "step": trainer.steps,
        "updates": trainer.optimizer.updates,
        "scaler": trainer.scaler.state(),
        "data": stream.state(),
        "plan": json.loads(json.dumps(trainer.plan.document())),
    }
    return checkpoint.save(
        folder, trainer.steps, tensors(trainer), extra, keep, trainer.mesh.group("coordination")
    )


def restore(trainer: Trainer, stream: DataStream, path: Path) -> None:
    """Go on from a checkpoint of any layout. Every rank calls it.

    Raises MeshwrightError where the checkpoint is broken, and InputError where the model, the optimizer or
    the data are not those of the plan.
    """
    group = trainer.mesh.group("coordination")
    _check_plan(trainer.plan, checkpoint.described(path, group)["plan"])
    extra = checkpoint.load(path, tensors(trainer), process_group=group)
    stream.restore(extra["data"])
    trainer.steps = int(extra["step"])
    trainer.scaler.restore(extra["scaler"])
    trainer.optimizer.restore(int(extra["updates"]))
    trainer.replica.store.publish()


def _check_plan(plan: Plan, then: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(plan.document()))
    for key in ("model", "workload"):
        for name, value in now[key].items():
            saved = then.get(key, {}).get(name)
            fixed = key == "model" or name == "optimizer"
            if fixed and name != "name" and saved != value:
                rule = "not as in the checkpoint's run: keep its value or start anew"
                raise InputError(f"{key}.{name}", value, rule, [saved])
    momentum, before = _momentum(now), _momentum(then)
    if (momentum == 0) != (before == 0):
        rule = "the checkpoint's run kept " + ("none: 0 it is" if before == 0 else "one: 0 would drop it")
        raise InputError("training.momentum", momentum, rule, [before])


def _momentum(document: Mapping[str, Any]) -> float:
    """SGD's momentum of a plan; 0 under another optimizer, which keeps none."""
    if document.get("workload", {}).get("optimizer") != "sgd":
        return 0.0
    return float((document.get("training") or {}).get("momentum", 0.0))
