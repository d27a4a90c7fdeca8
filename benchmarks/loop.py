"""The loop on the machine at hand: calibrate, predict, then measure the scaled-down brief in some layouts.

One model and one batch in every layout of one and two ranks; layouts of more ranks than there are processors
stand apart. Everything goes through the commands: `calibrate` measures the shapes of all layouts, and before
anything is trained their step times are written down. Then each layout is profiled in rounds, all layouts in
turn, and the median of its steps counts. Printed are the mean error of step times, how many of the pairs that
differ by more than 15 % are ranked right, and the error of the peak of tensors.

The plans state balanced routing, so tokens are spread evenly over experts; with `--as-routed` they go where
an untrained router sends them, and the fullest rank of two holds and computes more than predicted.

`python benchmarks/loop.py` takes about six minutes. Nothing else should compute meanwhile: the load before
and after is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from called import command

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "brief-repaired.yaml"
APART = 1.15
"""Ratio of two measured step times from which their order counts."""
TARGETS = {"time": 0.20, "ranking": 0.85, "memory": 0.10}

LAYOUTS: Mapping[str, tuple[dict[str, int], dict[str, Any]]] = {
    "1 rank": ({}, {}),
    "1 rank, micro-batch 1": ({}, {"micro_batch_size": 1}),
    "1 rank, micro-batch 4": ({}, {"micro_batch_size": 4}),
    "1 rank, full recompute": ({}, {"recompute": "full"}),
    "DP 2": ({"dp": 2}, {}),
    "DP 2, EP 2": ({"dp": 2, "ep": 2}, {}),
    "DP 2, ZeRO 3": ({"dp": 2}, {"zero_stage": 3}),
    "TP 2, EP 2": ({"tp": 2, "ep": 2}, {"sequence_parallel": True}),
    "TP 2, ETP 2": ({"tp": 2, "etp": 2}, {"sequence_parallel": True}),
    "PP 2, 1F1B": ({"pp": 2}, {"schedule": "1F1B"}),
    "PP 2, GPipe": ({"pp": 2}, {"schedule": "GPipe"}),
    "PP 2, DP 2": ({"pp": 2, "dp": 2}, {"schedule": "1F1B"}),
}
"""Degrees and choices of each layout; what is not named is 1, or as the scaled-down brief has it."""


@dataclass
class Row:
    """One layout: what was predicted before, and what was measured in all rounds."""

    name: str
    ranks: int
    predicted_s: float
    steps_s: list[float]
    predicted_bytes: int = 0
    measured_bytes: int = 0

    @property
    def measured_s(self) -> float:
        """The median step."""
        return statistics.median(self.steps_s)

    @property
    def time_error(self) -> float:
        """Predicted over measured, − 1."""
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        """The same of the peak of tensors."""
        return self.predicted_bytes / self.measured_bytes - 1


def write_plans(folder: Path) -> dict[str, Path]:
    """A plan's file for each layout: the brief scaled down to two ranks, one model and batch in all."""
    from meshwright.cluster import LocalRequest
    from meshwright.deployment import Deployment
    from meshwright.layout import Layout
    from meshwright.plan import open_placement, resolve, split_layers, write_plan
    from meshwright.scale_down import scaled_down
    from meshwright.verify import require_valid

    base = scaled_down(resolve(open_placement(EXAMPLE, Deployment)), 2).plan
    batch = base.workload.model_copy(
        update={"global_batch_size": 8, "sequence_length": base.workload.max_sequence_length}
    )
    plans = {}
    for number, (name, (degrees, choices)) in enumerate(LAYOUTS.items()):
        layout = Layout(**degrees)
        cluster, _ = LocalRequest(local=layout.world_size).resolve()
        stages = split_layers(base.model.num_hidden_layers, layout.num_stages)
        usual = {"schedule": "1F1B", "sequence_parallel": False, "layers_per_stage": stages}
        policy = base.policy.model_copy(update={**usual, **choices})
        fields = {"name": name, "layout": layout, "cluster": cluster, "policy": policy, "workload": batch}
        plan = base.model_copy(update=fields)
        require_valid(plan)
        plans[name] = folder / f"layout-{number}.yaml"
        write_plan(plan, plans[name])
    return plans


def predictions(plans: Mapping[str, Path], table: Path) -> list[Row]:
    """Step times of all layouts, before any of them is trained."""
    from meshwright.plan import read_plan

    rows = []
    for name, path in plans.items():
        found = command("simulate", str(path), "--calibration", str(table))
        rows.append(Row(name, read_plan(path).layout.world_size, found["step_time_s"], []))
    return rows


def measure(
    rows: Sequence[Row], plans: Mapping[str, Path], table: Path, rounds: int, always: Sequence[str]
) -> None:
    """Profile every layout in each round."""
    for number in range(rounds):
        for row in rows:
            flags = ("--calibration", str(table), "--nproc", str(row.ranks), *always)
            found = command("profile", str(plans[row.name]), *flags)
            row.steps_s += found["steps_s"]
            row.measured_bytes = max(found["memory_bytes"]["measured"])
            row.predicted_bytes = max(found["memory_bytes"]["predicted_by_pipeline_rank"])
            print(f"  round {number + 1}: {row.name} {1e3 * row.measured_s:.0f} ms", file=sys.stderr)


def ranked_right(rows: Sequence[Row]) -> tuple[int, int]:
    """Pairs of layouts that differ measurably and stand in the right order, and all that differ."""
    pairs = [(a, b) for a, b in combinations(rows, 2) if ratio(a.measured_s, b.measured_s) > APART]
    right = sum((a.predicted_s < b.predicted_s) == (a.measured_s < b.measured_s) for a, b in pairs)
    return right, len(pairs)


def ratio(one: float, other: float) -> float:
    """The larger over the smaller."""
    return max(one, other) / min(one, other)


def report(rows: Sequence[Row], cores: int) -> Iterator[str]:
    """The table and the three figures, in lines."""
    heads = f"{'ranks':>5} {'predicted':>10} {'measured':>10} {'off':>6} {'quartiles':>15} {'memory off':>11}"
    yield f"{'':<24} {heads}"
    for row in sorted(rows, key=lambda one: one.ranks):
        low, _, high = statistics.quantiles(row.steps_s, n=4)
        yield (
            f"{row.name:<24} {row.ranks:>5} {1e3 * row.predicted_s:>7.1f} ms {1e3 * row.measured_s:>7.1f} ms "
            f"{row.time_error:>+6.0%} {1e3 * low:>7.1f}–{1e3 * high:<7.1f} {row.memory_error:>+11.1%}"
        )
    for words, chosen in (
        (f"up to {cores} ranks", [row for row in rows if row.ranks <= cores]),
        (f"more ranks than the {cores} processors", [row for row in rows if row.ranks > cores]),
    ):
        if chosen:
            yield from figures(words, chosen)


def figures(words: str, rows: Sequence[Row]) -> Iterator[str]:
    """Mean errors and ranking of some layouts, with the targets."""
    time = statistics.mean(abs(row.time_error) for row in rows)
    memory = [abs(row.memory_error) for row in rows]
    right, pairs = ranked_right(rows)
    yield f"{words}, {len(rows)} layouts:"
    yield f"  step time off by {time:.1%} in the mean (target {TARGETS['time']:.0%})"
    if pairs:
        share = right / pairs
        yield f"  {right} of {pairs} pairs ranked right, {share:.0%} (target {TARGETS['ranking']:.0%})"
    of_memory = f"{statistics.mean(memory):.1%} in the mean, {max(memory):.1%} at most"
    yield f"  memory off by {of_memory} (target {TARGETS['memory']:.0%})"


def main() -> None:
    """Calibrate, predict, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="120 s", help="of the calibration (120 s)")
    parser.add_argument("--rounds", type=int, default=2, help="profiles of each layout (2)")
    parser.add_argument("--steps", type=int, default=20, help="steps in each of them (20)")
    parser.add_argument("--as-routed", action="store_true", help="tokens go where an untrained router says")
    asked = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        plans = write_plans(Path(folder))
        table = Path(folder) / "here.yaml"
        print(f"load before: {os.getloadavg()[0]:.1f} on {cores} processors", flush=True)
        measured = [path for name, path in plans.items() if name != "PP 2, DP 2"]
        flags = [word for path in measured for word in ("--plan", str(path))]
        found = command("calibrate", *flags, "--nproc", "2", "--budget", asked.budget, "-o", str(table))
        print(f"calibrated in {found['wall_s']:.0f} s; of the layouts' seconds measured:")
        for one in found["plans"]:
            print(f"  {one['plan']:<24} {one['measured_fraction']:.0%}")
        rows = predictions(plans, table)
        routed = () if asked.as_routed else ("--balanced",)
        measure(rows, plans, table, asked.rounds, ("--steps", str(asked.steps), *routed))
        print(f"load after: {os.getloadavg()[0]:.1f}")
        for line in report(rows, cores):
            print(line)
        if found["machine"]["device"] == "cpu":
            print("on a GPU: not measured, none is at hand")


if __name__ == "__main__":
    main()
