"""`meshwright train` as its users meet it: what it prints, what it leaves, and what it says of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import MOE, small_deployment, written

from meshwright.__main__ import main
from meshwright.plan import read_plan
from meshwright.runtime.checkpoint import survey

KEYS = {
    "step",
    "loss",
    "aux_loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "tokens",
    "tokens_per_s",
    "mfu",
    "step_time_s",
    "peak_memory_bytes",
    "expert_load_max_over_mean",
    "dropped_fraction",
}
"""What others read of each line."""

DEPLOYMENT = small_deployment(
    MOE, ranks=2, layers=2, ep=2, batch=(4, 64), training={"steps": 4, "learning_rate": 0.01}
)


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    """A deployment file that two local ranks train."""
    return written(DEPLOYMENT, tmp_path)


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-m", "meshwright", "train", *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command, capture_output=True, text=True, env={**clean, **environment}, timeout=120, check=False
    )


def lines(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The JSON lines of a run that went well and printed nothing else."""
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """A run's JSON lines, and the folder that it kept."""
    folder = tmp_path_factory.mktemp("trained")
    path = written(DEPLOYMENT, folder)
    kept = ("-o", folder / "run", "--save-every", 2, "--keep", 2)
    return lines(run(path, "--json", "--steps", 5, *kept)), folder / "run"


def test_json_is_one_line_a_step_and_nothing_else(trained: Any) -> None:
    steps, _ = trained
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step.keys() >= KEYS
        assert step["tokens"] == 4 * 64
        assert step["mfu"] is None  # nobody knows the peak of the machine at hand
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_routing_is_logged_under_fairseqs_names_for_each_layer(trained: Any) -> None:
    step = trained[0][0]
    for key in ("entropy_gating", "unused_expert1_count", "expert2_balance_top", "overflow_expert1"):
        assert len(step["layers"][key]) == 2
        assert step[key] == pytest.approx(sum(step["layers"][key]) / 2)
    assert step["expert_load_max_over_mean"] == max(step["layers"]["load_max_over_mean"])


def test_the_screen_says_who_computes_what_and_that_weights_are_as_predicted(deployment: Path) -> None:
    result = run(deployment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "weights: every rank holds what was predicted" in result.stdout
    assert "embedding, 0–1, head" in result.stdout
    assert "of a guess by the frequency of tokens alone" in result.stdout


def test_a_run_keeps_its_plan_its_steps_and_whole_checkpoints(trained: Any) -> None:
    steps, output = trained
    written = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in written[:5]] == [step["loss"] for step in steps]
    assert read_plan(output / "plan.yaml").layout.dp == 2
    assert [(found.step, found.problem) for found in survey(output / "checkpoints")] == [(4, None), (5, None)]
    assert any((output / "tensorboard").iterdir())


def test_a_run_is_resumed_on_another_layout(trained: Any, deployment: Path, tmp_path: Path) -> None:
    steps, output = trained
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000004").symlink_to(output / "checkpoints" / "step-00000004")
    one = ("--set", "cluster.local=1", "--set", "layout.dp=1", "--set", "layout.ep=1")
    rest = lines(run(deployment, "--json", "--steps", 5, "-o", tmp_path, "--resume", *one))
    assert [step["step"] for step in rest] == [5]
    assert rest[0]["loss"] == pytest.approx(steps[-1]["loss"], rel=1e-6)
    assert [found.step for found in survey(tmp_path / "checkpoints")] == [4, 5]


def test_torchrun_starts_the_ranks_and_only_the_first_prints(deployment: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "meshwright", "train", str(deployment), "--json", "--steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert len(lines(result)) == 2


def test_what_is_wrong_for_one_of_torchruns_ranks_is_said_by_all(deployment: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    wrong = ["--set", "training.data=nowhere.txt"]
    command = [*launcher, "-m", "meshwright", "train", str(deployment), *wrong]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said
    assert all("training.data: 'nowhere.txt'" in line for line in said)
    assert "a defect of meshwright" not in result.stderr


def test_a_plan_is_scaled_down_to_the_ranks_of_this_machine(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "brief-repaired.yaml"
    result = run(example, "--scale-down", "--nproc", 2, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert "scaled down: parameters 4,466,084,864 → " in result.stdout
    assert "pp 4 → 2" in result.stdout


BAD_INPUT = {
    "ranks": (("--nproc", 3), "--nproc: 3: the plan's layout has 2 ranks"),
    "data": (("--set", "training.data=nowhere.txt"), "training.data: 'nowhere.txt'"),
    "vocabulary": (("--set", "model.vocab_size=100"), "256"),
    "engine": (
        ("--set", "policy.engine=megatron"),
        "policy.engine: 'megatron': meshwright runs its own",
    ),
    "a setting of others": (
        ("--set", "policy.settings.moments=bf16"),
        "policy.settings.moments: 'bf16': the native engine cannot be set so: torch.optim.AdamW keeps",
    ),
    "fp8": (("--set", "workload.precision=fp8"), "workload.precision: 'fp8'"),
    "context": (("--set", "layout.cp=2", "--set", "layout.dp=1"), "layout.cp: 2"),
    "nothing to resume": (("--resume",), "--output: 'missing': --resume needs the run's folder"),
    "no GPU": (("--device", "cuda"), "--device: 'cuda': 2 ranks need a GPU each"),
    "steps": (("--steps", 0), "--steps: 0: at least 1"),
    "rate": (("--set", "training.learning_rate=-1"), "training.learning_rate: -1"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_code_2(
    name: str, deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: nothing of this starts a rank."""
    arguments, message = BAD_INPUT[name]
    if name == "no GPU" and _has_gpus():
        pytest.skip("this machine has the GPUs")
    assert main(["train", str(deployment), *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def _has_gpus() -> bool:
    import torch

    return torch.cuda.device_count() >= 2


def test_a_folder_without_a_whole_checkpoint_is_said(
    deployment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("--set", "cluster.local=1", "--set", "layout.dp=1", "--set", "layout.ep=1")
    arguments = ["train", str(deployment), "-o", str(tmp_path / "empty"), "--resume", *one]
    assert main(arguments) == 2
    assert "no whole checkpoint is there" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(deployment: Path) -> None:
    result = run(deployment, "--steps", 30, "--set", "training.learning_rate=1e20", "--json")
    assert result.returncode == 2
    assert "lower training.learning_rate" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_rank_that_dies_ends_the_others_and_is_named(deployment: Path, monkeypatch: Any) -> None:
    """In this process, so that a rank can be made to die."""
    from meshwright.errors import MeshwrightError
    from meshwright.planner.planned import planned
    from meshwright.runtime.launch import run_local

    def work(mesh: Any) -> None:
        if mesh.rank == 1:
            os.kill(os.getpid(), 9)
        import torch.distributed as dist

        dist.barrier()

    with pytest.raises((MeshwrightError, RuntimeError), match="rank"):
        run_local(planned(str(deployment)), 2, "cpu", work)
