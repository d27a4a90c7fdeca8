"""One call for many layouts: tasks and sizes lowered by arrays are those of each layout alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from meshwright.engines import engine_named
from meshwright.families import model_named
from meshwright.ir.blocks import embedding_block, head_block, layer_block
from meshwright.ir.dense import Shape
from meshwright.ir.graph import Block
from meshwright.ir.lowering import LoweredBlock, block_tasks, gradient_reductions, parameter_gathers
from meshwright.ir.parameters import block_parameters
from meshwright.ir.tasks import CommTask, Task
from meshwright.layout import Layout
from meshwright.model import Model
from meshwright.policy import EngineName, Recompute

MODELS = ("qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "llama-3-8b", "qwen1.5-moe-a2.7b")
LAYOUTS = [
    Layout(tp=tp, cp=cp, dp=dp, pp=1, ep=ep, etp=etp)
    for tp, cp, dp, ep, etp in (
        (2, 1, 8, 2, 1),
        (2, 2, 4, 4, 2),
        (4, 1, 4, 8, 1),
        (8, 2, 2, 2, 4),
        (16, 1, 1, 4, 2),
        (4, 4, 1, 8, 2),
    )
]
MICRO_BATCHES = (1, 2, 3, 4, 8, 1)


class Arrays:
    """The sizes of all layouts at once."""

    def size(self, axis: str) -> Any:
        if axis == "dp_replica":
            return 1
        return np.array([float(layout.size(axis)) for layout in LAYOUTS])


def blocks_of(model: Model, shape: Shape) -> list[Block]:
    layers = {model.layer_kind(layer): layer for layer in range(model.num_hidden_layers)}
    return [
        embedding_block(model, shape),
        *(layer_block(model, layer, shape) for layer in layers.values()),
        head_block(model, shape),
    ]


def lowered(
    model: Model, engine: EngineName, recompute: Recompute, sizes: Any, micro_batch: Any, tp: Any, sp: bool
) -> list[LoweredBlock]:
    facts = engine_named(engine)
    shape = Shape(micro_batch, 4096, 2, facts, sp, "alltoall", 1, tp)
    degrees: Any = {axis: sizes.size(axis) for axis in ("tp", "cp", "ep", "etp")}
    degrees["sp"] = degrees["tp"] if sp else 1
    found = []
    for block in blocks_of(model, shape):
        params = block_parameters(model, block.name)
        added = [
            *parameter_gathers(block, params, sizes, ("forward", "input_gradient"), 2),
            *gradient_reductions(block.name, params, sizes, 4),
        ]
        found.append(block_tasks(block, degrees, facts, recompute, added))
    return found


def at(value: Any, index: int) -> float:
    return float(np.broadcast_to(np.asarray(value, float), (len(LAYOUTS),))[index])


def facts(task: Task, index: int) -> tuple[Any, ...]:
    if isinstance(task, CommTask):
        return task.name, task.phase, task.kind, task.axis, at(task.num_ranks, index), at(task.bytes, index)
    sizes = tuple(at(size, index) for size in task.sizes)
    return task.name, task.phase, task.kind, sizes, at(task.flops, index), at(task.traffic_bytes, index)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["megatron", "torchtitan"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sp", [True, False])
def test_arrays_give_what_each_layout_gives_alone(
    name: str, engine: EngineName, recompute: Recompute, sp: bool
) -> None:
    model, sizes = model_named(name), Arrays()
    many = lowered(model, engine, recompute, sizes, np.array(MICRO_BATCHES, float), sizes.size("tp"), sp)
    for index, (layout, micro_batch) in enumerate(zip(LAYOUTS, MICRO_BATCHES, strict=True)):
        alone = lowered(model, engine, recompute, layout, micro_batch, layout.tp, sp)
        for block, one in zip(many, alone, strict=True):
            tasks = [facts(task, index) for task in block.tasks]
            silent = [f for f in tasks if f[-2] == 1 and len(f) == 6 and isinstance(f[3], str)]
            assert [f for f in tasks if f not in silent] == [facts(task, 0) for task in one.tasks]
            assert {n: (at(s, index), w) for n, (s, w) in block.saved.items()} == one.saved
            assert at(block.saved_bytes, index) == one.saved_bytes
            assert at(block.deferred_bytes, index) == one.deferred_bytes
