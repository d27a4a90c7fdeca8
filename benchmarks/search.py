"""How fast layouts are searched, and whether the answer is that of pricing one plan at a time.

Each case runs in a process of its own on one core. The yardstick is `estimate`, which prices one plan: the
search is as many times faster as it prices more points per CPU-second. `python benchmarks/search.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "deepseek-v3, 512 h100-sxm, megatron": {"model": "deepseek-v3"},
    "qwen3-30b-a3b, 512 h100-sxm, native": {"model": "qwen3-30b-a3b"},
    "qwen3-30b-a3b, 512 h100-sxm, megatron": {"model": "qwen3-30b-a3b", "engine": "megatron"},
    "the same, every point that fits": {"model": "qwen3-30b-a3b", "engine": "megatron", "whole": True},
}
NODES, BATCH, LENGTH = 64, 4096, 4096
SAMPLES = 50
SMALL = {"model": "qwen3-30b-a3b", "engine": "native", "nodes": 2, "batch": 64}


def deployment(model: str, engine: str | None = None, nodes: int = NODES, batch: int = BATCH) -> Any:
    """A model on H100 nodes, with everything else left open."""
    from meshwright.deployment import deployment_from

    document = {
        "cluster": {"nodes": nodes, "gpu": "h100-sxm"},
        "model": model,
        "workload": {"global_batch_size": batch, "sequence_length": LENGTH},
        "policy": {"engine": engine} if engine else {},
    }
    return deployment_from(document, Path())


def search_of(given: Any, at_least: int | None) -> Any:
    """A search of a deployment's space."""
    from meshwright.planner.answer import tables_at
    from meshwright.planner.drafting import space_of
    from meshwright.planner.lengths import lengths_of
    from meshwright.planner.prices import prices
    from meshwright.planner.search import Search

    space = space_of(given, given.cluster.resolve()[0])
    priced = prices(space.cluster, space.workload.precision, space.engine_name)
    tables = tables_at(space, priced, lengths_of(space.workload))
    return Search(space, priced, tables, at_least=at_least)


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process: counts, seconds, memory, and the agreement of random priced points."""
    from meshwright.planner.search import AT_LEAST

    given = deployment(case["model"], case.get("engine"))
    wall, cpu = time.perf_counter(), time.process_time()
    search = search_of(given, None if case.get("whole") else AT_LEAST)
    found = search.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = {key: getattr(found, key) for key in ("legal", "feasible", "priced")}
    spent = {"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak}
    return {**counts, **spent, **agreement(search)}


def whole_plan(case: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds from a deployment to its ranked plans, finalists simulated, and memory at its peak."""
    from meshwright.planner.answer import plan_deployment

    given = deployment(case["model"], case.get("engine"))
    began = time.process_time()
    plan_deployment(given)
    spent = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"plan_cpu_s": spent, "plan_peak_bytes": peak}


def agreement(search: Any) -> dict[str, float]:
    """Random priced points, recomputed one by one: the largest relative differences, and how long it took."""
    import numpy as np

    from meshwright.cost.memory import memory, worst
    from meshwright.ir.program import lower
    from meshwright.planner.estimate import estimate

    known = np.flatnonzero(np.isfinite(search.points.seconds)).tolist()
    time_error = memory_error = 0.0
    cpu = 0.0
    for position in random.Random(1).sample(known, SAMPLES):
        point = search.points.priced(position)
        plan = search.space.plan_of(point.candidate)
        started = time.process_time()
        alone_s = estimate(plan).total_s
        cpu += time.process_time() - started
        used = worst(memory(lower(plan))).total_bytes
        time_error = max(time_error, abs(point.step_time_s / alone_s - 1))
        memory_error = max(memory_error, abs(point.peak_memory_bytes / used - 1))
    return {"time_error": time_error, "memory_error": memory_error, "alone_per_cpu_s": SAMPLES / cpu}


def same_on_a_small_cluster() -> tuple[int, int, bool]:
    """Points priced by a pruned and by an exhaustive search of 16 GPUs, and whether their answers agree."""
    pruned, whole = (search_of(deployment(**SMALL), at_least).run() for at_least in (0, None))  # type: ignore[arg-type]
    same = pruned.best == whole.best and pruned.front == whole.front
    return pruned.priced, whole.priced, same


def in_processes(name: str) -> dict[str, Any]:
    """A case, search and whole plan each in a fresh process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found: dict[str, Any] = {}
    for option in ("--case", "--plan"):
        command = [sys.executable, __file__, option, name]
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        found |= json.loads(done.stdout)
    return found


def main() -> None:
    """Print the table and the two checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), help="run one case and print it as JSON")
    parser.add_argument("--plan", choices=list(CASES), help="plan one case whole and print it as JSON")
    asked = parser.parse_args()
    if asked.case or asked.plan:
        print(json.dumps(measured(CASES[asked.case]) if asked.case else whole_plan(CASES[asked.plan])))
        return
    head = ("legal", "fit", "priced", "wall s", "CPU s", "priced/CPU-s", "x alone", "peak MB", "plan CPU s")
    print(f"{'case':<40} " + " ".join(f"{word:>12}" for word in head))
    rows = {name: in_processes(name) for name in CASES}
    for name, row in rows.items():
        rate = row["priced"] / row["cpu_s"]
        cells = [f"{row[key]:,}" for key in ("legal", "feasible", "priced")]
        cells += [f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", f"{rate:,.0f}"]
        peak = max(row["peak_bytes"], row["plan_peak_bytes"])
        cells += [f"{rate / row['alone_per_cpu_s']:,.0f}", f"{peak / 1e6:.0f}"]
        cells += [f"{row['plan_cpu_s']:.1f}"]
        print(f"{name:<40} " + " ".join(f"{cell:>12}" for cell in cells))
    time_error = max(row["time_error"] for row in rows.values())
    memory_error = max(row["memory_error"] for row in rows.values())
    print(
        f"{SAMPLES} random priced points of each, one by one: time differs by {time_error:.1e} at most, ",
        end="",
    )
    print(f"memory by {memory_error:.1e}")
    pruned, whole, same = same_on_a_small_cluster()
    print(f"16 GPUs: {pruned:,} priced when pruned, {whole:,} when not; the answers are ", end="")
    print("the same" if same else "DIFFERENT")


if __name__ == "__main__":
    main()
