"""How fast a step is simulated on one core, how time grows with events, and how near the estimate it comes.

Each case runs in a process of its own with one thread; CPU seconds are the best of some rounds. The yardstick
is `estimate` of the same plan. `python benchmarks/simulation.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROUNDS = 5
SAMPLES = 100
MICRO_BATCHES = (64, 128, 256)
CASES = ("deepseek", "sends_beside", "samples", "agreement")
RUNNABLE = (
    "brief-repaired",
    "brief-30b",
    "deepseek-v3-2048",
    "mixtral-8x22b-128",
    "qwen3-30b-a3b-16",
    "qwen3-30b-a3b-512",
)


def plan_of(name: str, *overrides: str) -> Any:
    """An example's plan, with overrides."""
    from meshwright.deployment import Deployment
    from meshwright.plan import open_placement, resolve

    return resolve(open_placement(EXAMPLES / f"{name}.yaml", Deployment, overrides))


def best(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """CPU seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def deepseek() -> list[dict[str, Any]]:
    """DeepSeek-V3 over 16 ranks of two chunks: one step, every event of it, its trace; by micro-batches."""
    batches = [f"workload.global_batch_size={128 * count}" for count in MICRO_BATCHES]
    return [timed(plan_of("deepseek-v3-2048", batch)) for batch in batches]


def sends_beside() -> list[dict[str, Any]]:
    """The same under an engine whose sends flow beside compute, so that every action shares its links."""
    overrides = ("policy.engine=megatron", "policy.schedule=Interleaved1F1B", "policy.recompute=full")
    batches = [f"workload.global_batch_size={128 * count}" for count in MICRO_BATCHES[:2]]
    return [timed(plan_of("deepseek-v3-2048", batch, *overrides)) for batch in batches]


def timed(plan: Any) -> dict[str, Any]:
    """One plan: seconds from nothing to a simulated step, to its timeline, and to a file."""
    from meshwright.ir import schedule
    from meshwright.planner.estimate import estimate
    from meshwright.simulator.simulate import simulate

    def from_nothing() -> object:
        schedule._built.cache_clear()
        return simulate(plan)

    found = simulate(plan)
    timeline = found.timeline()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json.gz"
        written = best(lambda: timeline.to_chrome_trace(trace), 1)
        size = trace.stat().st_size
    return {
        "micro_batches": plan.num_micro_batches,
        "events": found.events,
        "simulate_s": best(from_nothing),
        "timeline_s": best(found.timeline),
        "trace_s": written,
        "trace_bytes": size,
        "estimate_s": best(lambda: estimate(plan)),
    }


def samples() -> dict[str, Any]:
    """Draws of uneven routing and of stragglers on the repaired brief."""
    from meshwright.simulator.draws import Spread
    from meshwright.simulator.options import Options
    from meshwright.simulator.simulate import sample_steps
    from meshwright.workload import Lognormal

    plan = plan_of("brief-repaired")
    options = Options(imbalance=Lognormal(lognormal=0.5), stragglers=Spread(0.02))
    found = sample_steps(plan, options, SAMPLES)
    seconds = best(lambda: sample_steps(plan, options, SAMPLES), 2)
    low, middle, high = (found.quantile(share) for share in (0.1, 0.5, 0.9))
    return {"samples_s": seconds, "low_s": low, "middle_s": middle, "high_s": high}


def agreement() -> list[dict[str, Any]]:
    """Simulated over estimated step time of each example: as it is, and without sends and contention."""
    from dataclasses import replace

    from meshwright.ir.program import lower
    from meshwright.planner.estimate import compose, measure_program
    from meshwright.planner.prices import Conditions, prices
    from meshwright.simulator.options import Options
    from meshwright.simulator.simulate import simulate

    rows = []
    for name in RUNNABLE:
        plan = plan_of(name)
        rates = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
        length = plan.workload.max_sequence_length
        measured = measure_program(lower(plan), rates, Conditions(), length)
        silent = replace(measured, sends=tuple({} for _ in measured.sends))
        alone = simulate(plan, Options(point_to_point=False, contention=False)).step_time_s
        rows.append(
            {
                "name": name,
                "schedule": plan.policy.schedule,
                "without_sends": alone / compose(silent, rates).total_s - 1,
                "as_it_is": simulate(plan).step_time_s / compose(measured, rates).total_s - 1,
            }
        )
    return rows


def in_a_process(name: str) -> Any:
    """A case in a fresh process with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help="run one case and print it as JSON")
    one = parser.parse_args().case
    if one:
        print(json.dumps(globals()[one]()))
        return
    print("DeepSeek-V3, 16 ranks x 2 chunks, DualPipeV")
    show(in_a_process("deepseek"))
    print("the same with Interleaved1F1B on Megatron, whose sends flow beside compute")
    show(in_a_process("sends_beside"))
    draws = in_a_process("samples")
    print(f"brief-repaired, {SAMPLES} draws of routing and stragglers: {draws['samples_s']:.3f} s; ", end="")
    print(f"step {draws['low_s']:.4f} to {draws['high_s']:.4f} s in 80 % of them")
    print("simulated over estimated, - 1           without sends    as it is")
    for row in in_a_process("agreement"):
        name = f"{row['name']} ({row['schedule']})"
        print(f"  {name:<40} {row['without_sends']:>+10.1e} {row['as_it_is']:>+11.2%}")


def show(rows: list[dict[str, Any]]) -> None:
    """Print how time grows with events."""
    for row in rows:
        ratio = row["simulate_s"] / rows[0]["simulate_s"]
        events = row["events"] / rows[0]["events"]
        print(
            f"  {row['micro_batches']:>4} micro-batches: {row['events']:>9,} events in "
            f"{row['simulate_s']:.3f} s ({events:.2f} x the events, {ratio:.2f} x the time; "
            f"{row['simulate_s'] / row['estimate_s']:.0f} x estimate), "
            f"as a timeline {row['timeline_s']:.2f} s more, "
            f"trace of {row['trace_bytes'] / 1e6:.1f} MB in {row['trace_s']:.2f} s"
        )


if __name__ == "__main__":
    main()
