"""The same step for real: ranks over gloo, seen by the recorder of dry runs with tensors that have values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layouts import Case
from ranks import run_ranks
from training_runs import made_once, mesh_of

from meshwright.ir.observed import Conduct, Peak
from meshwright.plan import Plan
from meshwright.runtime.dryrun.actions import actions_seen
from meshwright.runtime.dryrun.recorder import Recorder
from meshwright.runtime.dryrun.rehearse import _classify, _hear_of, conduct_of
from meshwright.runtime.step import Trainer


class RealRecorder(Recorder):
    """Counts as a dry run does and leaves every op as it is."""

    def __init__(self) -> None:
        super().__init__(known=None)  # type: ignore[arg-type]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._noted(func, args)
        elif func is not torch.ops.aten._local_scalar_dense.default:
            self._count(func, args, out)
            self._hold(out)
        return out


def real(case: Case, folder: Path) -> list[tuple[Conduct, Peak]]:
    """What every rank of a case did in its second step, and its fullest moment."""
    plan = case.plan("adamw")
    return made_once(folder / f"real-{plan.digest}", lambda: run_ranks(case.world, _seen, plan))


def _seen(rank: int, plan: Plan) -> tuple[Conduct, Peak]:
    mesh = mesh_of(plan, rank)
    recorder = RealRecorder()
    recorder.name_groups(mesh)
    with recorder.storages.watching_resizes(), actions_seen(recorder), recorder:
        trainer = Trainer(plan, mesh, routes_evenly=True)
        _classify(trainer, recorder)
        _hear_of(trainer, recorder)
        recorder.step_begins()
        rows, length = plan.sequences_per_replica, plan.workload.max_sequence_length
        tokens = torch.randint(0, plan.model.vocab_size, (rows, length))
        trainer.step(tokens, tokens.roll(-1, 1))
        return conduct_of(trainer, recorder), recorder.storages.peak()
