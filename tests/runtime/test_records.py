"""Numbers that leave their range: in what is computed, in what is asked, and in what is reported."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import MOE, small_deployment, written

from meshwright.__main__ import main
from meshwright.deployment import deployment_from
from meshwright.model import Router
from meshwright.plan import resolve
from meshwright.runtime.mesh import single_process
from meshwright.runtime.metrics import _mfu
from meshwright.runtime.routing import route

DEPLOYMENT = small_deployment(MOE)


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    return written(DEPLOYMENT, tmp_path)


def test_a_forward_pass_that_overflows_is_reported_as_null(
    deployment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that fp16 cannot hold make every loss a NaN, which JSON has no word for."""
    wild = ("workload.precision=fp16", "training.learning_rate=1e6", "training.gradient_clip=0")
    settings = [word for key in wild for word in ("--set", key)]
    output = ("-o", str(tmp_path / "run"))
    assert main(["train", str(deployment), *settings, *output, "--steps", "3", "--json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["skipped"]
    assert last["loss"] is None
    assert last["entropy_gating"] is None
    written = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert json.loads(written[-1]) == last


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("model.position=learned", "model.max_position_embeddings=8"),
            "workload.sequence_length: 16: at most max_position_embeddings = 8",
        ),
        (("model.head_dim=5",), "model.head_dim: 5: rotary positions turn pairs"),
    ],
)
def test_positions_that_the_model_has_no_numbers_for_are_refused(
    settings: tuple[str, ...], message: str, deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(deployment), *(w for key in settings for w in ("--set", key))]) == 2
    assert message in capsys.readouterr().err


def test_a_number_of_small_ranks_is_named_by_its_flag(
    deployment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(deployment), "--scale-down", "--nproc", "3"]) == 2
    assert "--nproc: 3: a power of two" in capsys.readouterr().err


def test_a_capacity_beyond_all_tokens_drops_none() -> None:
    logits = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    for valid in (None, torch.ones(32, dtype=torch.bool)):
        kept = route(logits, Router(capacity_factor=1e30), 2, valid=valid).kept
        assert kept is not None
        assert bool(kept.all())


def test_no_share_of_a_gpus_peak_is_claimed_of_processors() -> None:
    cluster = {"nodes": 1, "gpus_per_node": 1, "gpu": "h100-sxm"}
    plan = resolve(deployment_from({**DEPLOYMENT, "cluster": cluster}, Path()))
    processors = single_process(torch.device("cpu"))
    assert _mfu(plan, processors, 16, 1.0) is None
    share = _mfu(plan, replace(processors, device=torch.device("cuda")), 16, 1.0)
    assert share is not None
    assert math.isfinite(share)
