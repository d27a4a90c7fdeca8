"""Four processes, pp 2 × FSDP2 2, one step of 1F1B: prints for each rank, as JSON, which of its forwards and
backwards found the stage's parameters whole, and which left them so. Run by `test_program.py`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor

RANKS, WIDTH, MICRO_BATCHES, MICRO_BATCH_SIZE = 4, 8, 4, 2


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": RANKS}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **where)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    for module in (*blocks, blocks):
        fully_shard(module, mesh=mesh["dp"], reshard_after_forward=True)
    position = mesh.get_local_rank("pp")
    shape = (MICRO_BATCH_SIZE, WIDTH)
    stage = PipelineStage(
        blocks,
        position,
        2,
        torch.device("cpu"),
        group=mesh.get_group("pp"),
        input_args=torch.empty(shape, device="meta", requires_grad=position > 0),
        output_args=torch.empty(shape, device="meta", requires_grad=True),
    )
    seen: list[tuple[str, bool, bool]] = []
    for name in ("forward_one_chunk", "backward_one_chunk"):
        setattr(stage, name, watched(getattr(stage, name), name.split("_", 1)[0], blocks, seen))
    schedule = Schedule1F1B(stage, n_microbatches=MICRO_BATCHES, loss_fn=nn.functional.mse_loss)
    batch = torch.randn(MICRO_BATCHES * MICRO_BATCH_SIZE, WIDTH)
    schedule.step(*([batch] if position == 0 else []), **({"target": batch} if position else {}))
    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps([position, seen, is_whole(blocks)]))


def watched(
    function: Callable[..., Any], name: str, blocks: nn.Sequential, seen: list[tuple[str, bool, bool]]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        before = is_whole(blocks)
        result = function(*args, **kwargs)
        seen.append((name, before, is_whole(blocks)))
        return result

    return run


def is_whole(blocks: nn.Sequential) -> bool:
    (answer,) = {not isinstance(parameter, DTensor) for parameter in blocks.parameters()}
    return answer


def main(folder: Path) -> int:
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(rank, folder)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        return 1
    print(json.dumps([json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
