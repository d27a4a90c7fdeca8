"""What a run leaves in its folder: its plan, one JSON line for each step, and curves for TensorBoard.

The folder holds `plan.yaml`, `steps.jsonl`, `tensorboard/` and `checkpoints/`. Lines are appended, so that a
run that is resumed keeps those of the run before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import InputError
from meshwright.plan import Plan, write_plan
from meshwright.runtime.metrics import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CURVES = (
    "loss",
    "aux_loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "tokens_per_s",
    "mfu",
    "step_time_s",
    "peak_memory_bytes",
    "expert_load_max_over_mean",
    "dropped_fraction",
)


class Journal:
    """Writes one run's records; one rank alone has one."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Raises InputError where the folder cannot be written."""
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.curves = _writer(folder / "tensorboard")
            self.lines = (folder / "steps.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            where = error.filename or folder
            raise InputError("--output", str(where), f"cannot be written: {error.strerror}") from None
        write_plan(plan, folder / "plan.yaml")

    def write(self, record: Record) -> None:
        """Add a step."""
        document = record.document()
        self.lines.write(json.dumps(document, allow_nan=False) + "\n")
        self.lines.flush()
        for key in CURVES:
            if document[key] is not None:
                self.curves.add_scalar(f"train/{key}", document[key], record.step)
        for key, values in record.routing.items():
            for place, value in enumerate(values):
                self.curves.add_scalar(f"routing/{key}/{place}", value, record.step)

    def close(self) -> None:
        """Write what is buffered."""
        self.lines.close()
        self.curves.close()


def _writer(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # loads slowly, and only one rank needs it

    return SummaryWriter(str(folder), flush_secs=10)
