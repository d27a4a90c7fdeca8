"""The command on this machine: it measures what a plan needs, and refuses what makes no sense."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DENSE, MOE, small_deployment
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.__main__ import main
from meshwright.calibrating.answer import _nproc
from meshwright.calibrating.shapes import grid
from meshwright.deployment import deployment_from
from meshwright.efficiency_table import read_table
from meshwright.files import to_yaml
from meshwright.ir.graph import CollectiveKind
from meshwright.model import Model
from meshwright.plan import resolve
from meshwright.runtime.calibrate import Shape, Surroundings
from meshwright.runtime.calibrate.links import timed_collective, usual_work
from meshwright.runtime.calibrate.rounds import (
    LEAST_ROUNDS,
    REPEATS,
    averaged,
    clock_of,
    in_turns,
    summed_up,
)
from meshwright.runtime.calibrate.subjects import subject_of
from meshwright.runtime.launch import run_local
from meshwright.runtime.mesh import Mesh


def written(document: dict[str, Any], path: Path) -> Path:
    """A deployment's file."""
    path.write_text(to_yaml(document), "utf-8")
    return path


def test_a_plan_of_two_ranks_is_measured_and_then_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = written(small_deployment(MOE, ranks=2, ep=2, batch=(4, 16)), tmp_path / "plan.yaml")
    table = tmp_path / "here.yaml"
    arguments = ["calibrate", "--plan", str(plan), "--budget", "1 s", "--nproc", "2", "-o", str(table)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (covered,) = found["plans"]
    assert covered["measured_fraction"] == pytest.approx(1.0)
    assert covered["unmeasured"] == []
    assert [kernels["ranks"] for kernels in found["kernels"]] == [2, 1]
    assert {link["collective"] for link in found["links"]} == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "send_recv",
    }
    assert all(point["samples"] >= LEAST_ROUNDS * REPEATS for point in found["kernels"][0]["points"])
    kept = read_table(table)
    assert kept.digest == found["digest"]
    assert kept.machine.is_here
    assert main(["simulate", str(plan), "--json"]) == 0
    assumed = json.loads(capsys.readouterr().out)["step_time_s"]
    assert main(["simulate", str(plan), "--calibration", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_time_s"] != assumed
    document = small_deployment(MOE, ranks=2, ep=2, batch=(4, 16))
    document["cluster"]["calibration"] = "here.yaml"  # from the file's folder
    inside = written(document, tmp_path / "inside.yaml")
    assert main(["plan", str(inside), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["plans"][0]
    assert planned["confidence"]["assumed_fraction"] == pytest.approx(0.0)


def test_what_is_found_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = written(small_deployment(DENSE), tmp_path / "plan.yaml")
    assert main(["calibrate", "--plan", str(plan), "--budget", "1 s", "--nproc", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 rank at work" in said
    assert "launching an op" in said
    assert "of a micro-batch's seconds 100% measured" in said


MODEL = resolve(deployment_from(small_deployment(MOE), Path())).model
GATED = resolve(deployment_from(small_deployment({**MOE, "num_key_value_heads": 2}), Path())).model


WIDE = resolve(deployment_from(small_deployment({**MOE, "head_dim": 64}), Path())).model
"""Its heads are wider than the ops below, as those of a plan are than the ops of a small reference."""


@pytest.mark.parametrize(
    "model", [MODEL, GATED, WIDE], ids=["heads of their own", "shared heads", "wide heads"]
)
def test_every_op_of_the_grid_runs_in_its_phases(model: Model) -> None:
    here = Surroundings(model, torch.float32, torch.device("cpu"))
    small = {(op, phase): tuple(min(size, 16) for size in sizes) for op, phase, sizes in grid("cpu")}
    for (op, phase), sizes in small.items():
        subject = subject_of(Shape(op, phase, sizes), here)
        subject.prepared(phase)()
        if phase == "weight_gradient":
            assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in subject.weights)
        if phase == "input_gradient" and subject.update is None:
            assert all(one.grad is not None for one in subject.inputs)
            assert not subject.splits or all(w.grad.abs().sum() == 0 for w in subject.weights)
        subject.settle()
        subject.prepared("forward" if phase != "step" else phase)()


def test_things_take_turns_and_their_first_runs_do_not_count() -> None:
    calls: list[str] = []

    def thing(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    rounds = iter([True, True, False])
    found = in_turns([lambda: thing("a"), lambda: thing("b")], 0.0, lambda wanted: next(rounds))
    turn = 1 + REPEATS
    assert "".join(calls) == "ab" + ("a" * turn + "b" * turn) * 2
    assert [len(samples) for samples in found] == [2 * REPEATS] * 2
    assert 1.0 not in found[0]


def test_the_median_and_its_spread() -> None:
    found = summed_up([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.time_s, found.samples) == (3.0, 5)
    assert found.spread == pytest.approx((4.0 - 2.0) / 2 / 3.0)


def test_a_mean_without_the_slowest_twentieth() -> None:
    found = averaged([1.0] * 10 + [2.0] * 9 + [1000.0])
    assert found.time_s == pytest.approx((10 + 18) / 19)
    assert found.samples == 20


def test_a_collective_is_timed_after_work_which_is_as_much_on_every_rank() -> None:
    plan = resolve(deployment_from(small_deployment(DENSE, ranks=2, batch=(4, 16)), Path()))
    seen = torch.zeros(2, dtype=torch.int64).share_memory_()

    def rank(mesh: Mesh) -> None:
        group = mesh.group("world")
        assert group is not None
        order: list[str] = []
        with FunctionsSeen(order):
            work = usual_work(group, mesh.device)
            order.clear()
            timed_collective(CollectiveKind.ALL_REDUCE, 64, group, mesh.device, work)()
        assert order.index("allreduce_") > order.index("mm")
        seen[mesh.rank] = order.count("mm")

    run_local(plan, 2, "cpu", rank)
    assert seen[0] == seen[1] > 0


class FunctionsSeen(TorchDispatchMode):
    """Names of the ops that run, in order."""

    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order = order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.order.append(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_as_many_ranks_are_at_work_as_the_plans_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    plans = [
        resolve(deployment_from(small_deployment(DENSE, ranks=ranks, batch=(8, 16)), Path()))
        for ranks in (1, 4, 8)
    ]
    assert _nproc(None, plans) == 4
    assert _nproc(None, plans[2:]) == 2
    assert _nproc(3, plans) == 3


BAD = {
    "no time": (("--budget", "1 ms"), "--budget: '1 ms': between 1 s and 1 h"),
    "no unit": (("--budget", "60"), "--budget"),
    "no ranks": (("--nproc", "0"), "--nproc: 0: between 1 and 64 ranks"),
    "no plan": (("--plan", "nowhere.yaml"), "nowhere.yaml"),
    "types that differ": (("--plan", "{}/fp32.yaml", "--plan", "{}/bf16.yaml"), "in one number type"),
    "ops that differ": (("--plan", "{}/fp32.yaml", "--plan", "{}/sgd.yaml"), "one optimizer, and the first"),
    "no plan to change": (("--set", "layout.tp=1"), "--set: 'layout.tp=1': changes a plan"),
    "no GPU": (("--plan", "{}/fp32.yaml", "--device", "cuda", "--nproc", "64"), "need a GPU each"),
    "over its plan": (("--plan", "{}/fp32.yaml", "-o", "{}/fp32.yaml"), "would be overwritten"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for precision in ("fp32", "bf16"):
        document = small_deployment(DENSE, workload={"precision": precision})
        written(document, tmp_path / f"{precision}.yaml")
    sgd = {"precision": "fp32", "optimizer": "sgd"}
    written(small_deployment(DENSE, workload=sgd), tmp_path / "sgd.yaml")
    flags, words = BAD[name]
    assert main(["calibrate", *(flag.format(tmp_path) for flag in flags)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_measured_and_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = written(small_deployment(MOE, workload={"precision": "bf16"}), tmp_path / "plan.yaml")
    table = tmp_path / "gpu.yaml"
    device = ("--device", "cuda", "--nproc", "1")
    assert main(["calibrate", "--plan", str(plan), "--budget", "5 s", "-o", str(table), *device]) == 0
    assert read_table(table).machine.device == "cuda"
    capsys.readouterr()
    assert main(["profile", str(plan), "--calibration", str(table), "--json", *device]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"][0]["compute_s"] > 0
    assert found["memory_bytes"]["measured"][0] > 0


def test_a_thread_with_a_processor_of_its_own_is_timed_by_what_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock_of(cpu, 2) is time.thread_time
    assert clock_of(cpu, 4) is time.perf_counter
    assert clock_of(gpu, 1) is time.perf_counter
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock_of(cpu, 1) is time.perf_counter
