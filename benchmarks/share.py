"""One rank's share of three plans on the device at hand: calibrate, predict, then measure what it computes.

On a GPU the shares are those of the examples as they stand: the repaired brief, Qwen3-30B-A3B on 512 GPUs and
Mixtral 8x22B on 128. On processors, which would take minutes for a step, the same plans are scaled down to
eight ranks of one thread, and widened fourfold again, so that matmuls take most of a step, as on a GPU.
A share runs alone: collectives are answered on the spot, and their time is left out. Printed is how far what
a step computes was off (target: 10 %), and "not measured" for a device that is not here.

`python benchmarks/share.py` takes about four minutes on processors. Nothing else should compute meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from called import command

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PLANS = ("brief-repaired", "qwen3-30b-a3b-512", "mixtral-8x22b-128")
SCALED_RANKS = 8
TARGET = 0.10
WIDENED, WIDTHS = 4, ("hidden_size", "head_dim", "moe_intermediate_size")

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Row:
    """One rank of a plan: seconds that it computes in a step, predicted and measured."""

    plan: str
    rank: int
    predicted_s: float
    measured_s: float
    memory_error: float

    @property
    def error(self) -> float:
        """Predicted over measured, − 1."""
        return self.predicted_s / self.measured_s - 1


def catalogue_name(driver_name: str) -> str | None:
    """The catalogue's name of the GPU at hand."""
    from meshwright.gpus import gpu_catalogue, is_named

    return next((name for name in gpu_catalogue() if is_named(name, driver_name)), None)


def write_plans(folder: Path, device: Device) -> dict[str, Path]:
    """The plans as they are measured: for the GPU that is here, or scaled down."""
    from meshwright.deployment import Deployment
    from meshwright.plan import open_placement, resolve, write_plan
    from meshwright.scale_down import scaled_down

    changes = ["policy.engine=native"]
    if device == "cuda":
        import torch

        gpu = catalogue_name(torch.cuda.get_device_name(0))
        if gpu is None:
            raise SystemExit(f"{torch.cuda.get_device_name(0)} is not in the catalogue")
        changes.append(f"cluster.gpu={gpu}")
    found = {}
    for name in PLANS:
        plan = resolve(open_placement(EXAMPLES / f"{name}.yaml", Deployment, changes))
        if device == "cpu":
            plan = scaled_down(plan, SCALED_RANKS, precision="fp32").plan
            wider = {width: WIDENED * getattr(plan.model, width) for width in WIDTHS}
            plan = plan.model_copy(update={"model": plan.model.model_copy(update=wider)})
        found[name] = folder / f"{name}.yaml"
        write_plan(plan, found[name])
    return found


def ranks_of(path: Path) -> list[int]:
    """The first rank of the first stage and of the last."""
    from meshwright.plan import read_plan

    layout = read_plan(path).layout
    of_stage = layout.world_size // layout.pp
    return sorted({0, (layout.pp - 1) * of_stage})


def measured(paths: dict[str, Path], device: Device, budget: str, steps: int, folder: Path) -> Iterator[Row]:
    """A table for each plan, then each of its ranks alone."""
    for name, path in paths.items():
        table = folder / f"{name}-table.yaml"
        asked = ("--plan", str(path), "--budget", budget, "--nproc", "1", "--device", device)
        command("calibrate", *asked, "-o", str(table))
        for rank in ranks_of(path):
            flags = ("--rank", str(rank), "--steps", str(steps), "--calibration", str(table))
            found = command("profile", str(path), *flags, "--device", device)
            memory = found["memory_bytes"]
            yield Row(
                name,
                rank,
                found["predicted_computed_s"],
                found["computed_s"],
                memory["predicted"] / memory["measured"] - 1,
            )


def report(rows: Sequence[Row]) -> Iterator[str]:
    """The table and the figure."""
    yield f"{'':<22} {'rank':>5} {'predicted':>11} {'measured':>11} {'off':>6} {'memory off':>11}"
    for row in rows:
        yield (
            f"{row.plan:<22} {row.rank:>5} {1e3 * row.predicted_s:>8.1f} ms {1e3 * row.measured_s:>8.1f} ms "
            f"{row.error:>+6.0%} {row.memory_error:>+11.1%}"
        )
    errors = [abs(row.error) for row in rows]
    off = f"{statistics.mean(errors):.1%} in the mean, {max(errors):.1%} at most"
    yield f"what a step computes is off by {off} (target {TARGET:.0%})"


def main() -> None:
    """Measure on each device that is here."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="40 s", help="of each plan's calibration (40 s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each rank (20)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="that one alone")
    asked = parser.parse_args()
    import torch

    for device in ("cpu", "cuda") if asked.device is None else (asked.device,):
        if device == "cuda" and not torch.cuda.is_available():
            print("on a GPU: not measured, none is at hand")
            continue
        words = torch.cuda.get_device_name(0) if device == "cuda" else f"scaled to {SCALED_RANKS} ranks"
        print(f"{device}, {words}; load before: {os.getloadavg()[0]:.1f}", flush=True)
        with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
            paths = write_plans(Path(folder), device)
            rows = list(measured(paths, device, asked.budget, asked.steps, Path(folder)))
        print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
