"""One rank alone does as it does among the others: the same calls and memory, and finite numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checked import plan_of
from commands import DENSE, MOE, small_deployment
from tables import table_for
from torch.utils._python_dispatch import _get_current_dispatch_mode

from meshwright.__main__ import main
from meshwright.cost.memory import memory
from meshwright.deployment import deployment_from
from meshwright.efficiency_table import write_table
from meshwright.files import to_yaml
from meshwright.ir.program import lower
from meshwright.plan import Plan, resolve
from meshwright.profiling.predicted import computed_s
from meshwright.profiling.share import alone_on
from meshwright.profiling.trace import labelled_calls, rank_trace
from meshwright.runtime import dispatch
from meshwright.runtime.dryrun.rehearse import observe
from meshwright.runtime.profile import Session, profile_plan
from meshwright.runtime.profile.alone import alone
from meshwright.runtime.step import Trainer
from meshwright.simulator.simulate import simulate
from meshwright.workload import Zipf

EIGHT: dict[str, Any] = {**MOE, "num_experts": 8}
LAYOUTS: dict[str, dict[str, Any]] = {
    "experts": {"ranks": 8, "ep": 4, "batch": (16, 16)},
    "experts gathered": {"ranks": 8, "ep": 4, "batch": (16, 16), "policy": {"dispatcher": "allgather"}},
    "zero 3": {"ranks": 4, "batch": (8, 16), "policy": {"zero_stage": 3}},
    "tensor": {
        "ranks": 8,
        "layout": {"tp": 2, "dp": 4, "ep": 2, "etp": 2},
        "batch": (8, 16),
        "policy": {"sequence_parallel": True},
    },
    "pipeline": {
        "ranks": 8,
        "layers": 4,
        "batch": (16, 16),
        "layout": {"pp": 2, "vpp": 2, "dp": 4, "ep": 4},
        "policy": {"schedule": "ZBVZeroBubble"},
    },
}


def plan_named(name: str, text: Path) -> Plan:
    """The plan of a layout."""
    return plan_of(small_deployment(EIGHT, **LAYOUTS[name]), text)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_alone_calls_and_holds_what_its_dry_run_does(name: str, text: Path, tmp_path: Path) -> None:
    """What a dry run calls and holds is what it does among the others (tests/dryrun/test_real.py)."""
    plan = plan_named(name, text)
    rank = plan.layout.world_size - 1
    (found,) = profile_plan(plan, Session(tmp_path, tmp_path, 2, routes_evenly=True, alone=rank), "cpu")
    trace = rank_trace(rank, json.loads(found.trace.read_text("utf-8"))["traceEvents"])
    seen = observe(plan, rank)
    said = sorted((c.axis, c.kind.value, c.bytes) for c in seen.conduct.calls if not c.is_receive)
    assert sorted(labelled_calls(trace)) == sorted(said * 2)
    assert seen.peak is not None
    assert found.peak_bytes == pytest.approx(seen.peak.bytes, rel=0.05)
    assert len(found.answered_s) == 2
    assert all(0 < own < whole for own, whole in zip(found.answered_s, found.step_s, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_numbers_are_finite(name: str, text: Path) -> None:
    plan = plan_named(name, text)
    with alone(plan, 1, torch.device("cpu")) as answering:
        trainer = Trainer(plan, answering.mesh, routes_evenly=True)
        rows = plan.sequences_per_replica
        for _ in range(2):
            tokens = torch.randint(0, 256, (rows, plan.workload.max_sequence_length))
            result = trainer.step(tokens, tokens.roll(-1, 1))
            assert torch.isfinite(result.loss)
            assert not result.outcome.skipped
    assert all(torch.isfinite(held.tensor).all() for held in trainer.replica.held if name != "zero 3")


def test_ops_run_as_they_always_do(text: Path) -> None:
    """What stood above every op would count as what the rank computes."""
    with alone(plan_named("experts", text), 1, torch.device("cpu")):
        assert _get_current_dispatch_mode() is None


def test_tokens_are_spread_evenly_in_what_is_predicted_too(text: Path) -> None:
    plan = plan_named("experts", text)
    skewed = plan.workload.model_copy(update={"routing": Zipf(zipf=1.2)})
    found = alone_on(plan.model_copy(update={"workload": skewed}))
    assert computed_s(found, 0) == computed_s(plan, 0)
    assert memory(lower(found)) == memory(lower(plan))


def test_what_is_predicted_is_the_compute_of_the_step() -> None:
    """Of one rank nothing else is in a step."""
    plan = resolve(deployment_from(small_deployment(MOE, layers=2), Path()))
    table = table_for(plan)
    priced = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"calibration": table})})
    assert computed_s(priced, 0) == pytest.approx(simulate(priced).step_time_s, rel=1e-9)
    two = table.kernels[0].model_copy(update={"ranks": 2})
    both = table.model_copy(update={"kernels": (two, table.kernels[0])})
    with_both = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"calibration": both})})
    kept = alone_on(with_both).cluster.calibration
    assert kept is not None
    assert [kernels.ranks for kernels in kept.kernels] == [table.kernels[0].ranks]


def run(name: str, text: Path, folder: Path, *flags: str) -> int:
    """The command on a layout's file."""
    file = folder / "small.yaml"
    document = {**small_deployment(EIGHT, **LAYOUTS[name]), "training": {"data": str(text)}}
    file.write_text(to_yaml(document), "utf-8")
    return main(["profile", str(file), "--steps", "2", *flags])


def test_the_share_is_printed_and_kept(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, output = tmp_path / "here.yaml", tmp_path / "share"
    write_table(table_for(plan_named("experts", text)), table)
    flags = ("--rank", "5", "--calibration", str(table))
    assert run("experts", text, tmp_path, *flags, "--json", "-o", str(output)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == 5
    assert found["predicted_computed_s"] > 0
    whole = zip(found["steps_computed_s"], found["steps_answered_s"], strict=True)
    assert all(own > 0 and answered > 0 for own, answered in whole)
    assert {path.name for path in output.iterdir()} == {"plan.yaml", "profile.json", "traces"}
    assert run("experts", text, tmp_path, *flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rank 5 alone" in said
    assert "computed in a step" in said
    assert "answered on the spot" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rank", "8"), "--rank: 8: a rank of this layout lies between 0 and 7"),
        (("--rank", "0", "--nproc", "8"), "--nproc: 8: --rank runs one rank alone"),
        (("--rank", "0", "-o", "{}/small.yaml/sub"), "--output"),
    ],
)
def test_bad_ranks_are_one_message(
    flags: tuple[str, ...], words: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("experts", text, tmp_path, *(flag.format(tmp_path) for flag in flags)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


def test_a_plan_of_one_rank_is_profiled_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(small_deployment(DENSE)), "utf-8")
    assert main(["profile", str(file), "--rank", "0"]) == 2
    assert "the plan has one rank" in capsys.readouterr().err


def test_as_many_rows_come_as_even_routing_sends(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To this rank's experts, alone as in a dry run."""
    plan, came = plan_named("experts", text), []
    exchange = dispatch.exchange

    def counted(x: Any, received: list[int], sent: list[int], group: Any) -> Any:
        came.append(sum(received))
        return exchange(x, received, sent, group)

    assert [task for task, _ in lower(plan).collectives(0) if task.kind.value == "all_to_all"]
    seen = observe(plan, 5)
    assert {sum(call.received) for call in seen.conduct.calls if call.sent} == {2 * 16}
    monkeypatch.setattr(dispatch, "exchange", counted)
    with alone(plan, 5, torch.device("cpu")) as answering:
        tokens = torch.randint(0, 256, (plan.sequences_per_replica, plan.workload.max_sequence_length))
        Trainer(plan, answering.mesh, routes_evenly=True).step(tokens, tokens)
    assert set(came) == {2 * 16}
