"""`meshwright audit` as a user meets it: exit codes, JSON, overrides, one screen, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.__main__ import main
from meshwright.files import read_yaml, to_yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
BRIEF = str(EXAMPLES / "brief.yaml")
REPAIRED = str(EXAMPLES / "brief-repaired.yaml")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", BRIEF]) == 0
    assert main(["audit", BRIEF, "--strict"]) == 1
    assert main(["audit", REPAIRED, "--strict"]) == 0
    assert main(["audit", REPAIRED, "--strict", "--set", "layout.dp=8"]) == 1
    assert capsys.readouterr().err == ""


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", BRIEF, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    worlds = [claim for claim in document["claims"] if claim["id"] == "world_size"]
    assert [claim["verdict"] for claim in worlds] == ["fails", "fails"]
    assert [claim["stated_formula_value"] for claim in worlds] == [2048, 2048]
    assert document["nearest_layouts"][0]["changes"] == ["dp: 4 -> 16"]
    assert document["layout"]["broken_rules"][0]["key"] == "layout.dp"


def test_overrides_are_audited(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", BRIEF, "--json", "--set", "claims.layout.dp=16"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["possible"] is True


def test_output_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "audit.json"
    assert main(["audit", BRIEF, "--json", "-o", str(file)]) == 0
    assert json.loads(file.read_text())["name"] == "brief"
    assert capsys.readouterr().out == ""


def test_the_brief_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", BRIEF])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 110


def test_full_shows_every_figure_formula_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", BRIEF, "--full"])
    out = capsys.readouterr().out
    for text in (
        "8 * 4 * 16 * 4",
        "arXiv:2104.04473",
        "allocator slack",
        "policy.zero_stage",
        "model.vocab_size",
    ):
        assert text in out


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", REPAIRED, "--set", "cluster.gpu.memory=2 GB"])
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_stages_that_do_not_add_up_are_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", REPAIRED, "--strict", "--set", "policy.layers_per_stage=[8, 8]"]) == 1
    assert "policy.layers_per_stage" in capsys.readouterr().out


def changed_brief(tmp_path: Path, change: dict[str, Any]) -> str:
    document = read_yaml(BRIEF)
    for path, value in change.items():
        place: Any = document
        *parents, last = path.split(".")
        for word in parents:
            if isinstance(place, list) and not word.isdigit():  # the first figure with this id
                place = next(figure for figure in place if figure["id"] == word)
            else:
                place = place[int(word)] if word.isdigit() else place[word]
        place[int(last) if last.isdigit() else last] = value
    file = tmp_path / "changed.yaml"
    file.write_text(to_yaml(document))
    return str(file)


FORMULA, MEMORY = "claims.figures.world_size.formula", "claims.figures.parameter_memory.value"
REFUSED = {
    "top-k above experts": ({"model.num_experts_per_tok": 65}, "model.num_experts_per_tok", "64"),
    "heads that do not divide": ({"model.num_key_value_heads": 5}, "model.num_key_value_heads", "4"),
    "unknown key": ({"model.hidden_sise": 1024}, "model.hidden_sise", "hidden_size"),
    "unknown key of the cluster": ({"cluster.gpuss": 8}, "cluster.gpuss", "gpu"),
    "missing unit": ({"cluster.gpu.memory": 64}, "cluster.gpu.memory", "64 GB"),
    "wrong unit": ({"cluster.gpu.memory": "64 GB/s"}, "cluster.gpu.memory", "64 GB"),
    "negative": ({"model.num_hidden_layers": -16}, "model.num_hidden_layers", "1"),
    "zero": ({"model.hidden_size": 0}, "model.hidden_size", "1"),
    "not a number": ({"workload.global_batch_size": float("nan")}, "workload.global_batch_size", "whole"),
    "infinite": ({"model.vocab_size": float("inf")}, "model.vocab_size", "whole"),
    "boolean for a count": ({"model.num_experts": True}, "model.num_experts", "whole number"),
    "text for a count": ({"model.num_experts": "64"}, "model.num_experts", "64"),
    "a fraction of a layer": ({"model.num_hidden_layers": 15.5}, "model.num_hidden_layers", "16"),
    "absurdly many layers": ({"model.num_hidden_layers": 1e9}, "model.num_hidden_layers", "1024"),
    "absurdly large batch": ({"workload.global_batch_size": 2**60}, "workload.global_batch_size", "2^53"),
    "a million nodes": ({"cluster.nodes": 1e6}, "cluster.nodes", "131072"),
    "unsupported architecture": ({"model": {"model_type": "mamba"}}, "model.model_type", "mixtral"),
    "unknown catalogue model": ({"model": "qwen3-30b-a3c"}, "model", "qwen3-30b-a3b"),
    "unknown catalogue GPU": ({"cluster.gpu": "h100-sxn"}, "cluster.gpu", "h100-sxm"),
    "unknown precision": ({"workload.precision": "fp17"}, "workload.precision", "fp16"),
    "lengths out of order": ({"workload.sequence_length": {"min": 9, "max": 8}}, "sequence_length", "8"),
    "unknown figure": ({"claims.figures.0.id": "parameterz"}, "claims.figures", "parameters"),
    "figure without its unit": ({MEMORY: 58.6}, "claims.figures", "unit"),
    "figure with a wrong unit": ({MEMORY: "58.6 ms"}, "claims.figures", "ms"),
    "formula that is no arithmetic": ({FORMULA: "open('x')"}, "claims.figures", "formula"),
    "formula that divides by zero": ({FORMULA: "1 / 0"}, "claims.figures", "zero"),
    "negative degree": ({"claims.layout.tp": -8}, "claims.layout.tp", "1"),
    "micro-batches as text": ({"claims.layout.num_micro_batches": "4"}, "num_micro_batches", "4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_gets_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key, the value, the rule, the nearest valid values; exit code 2; nothing on stdout."""
    change, key, nearest = REFUSED[name]
    assert main(["audit", changed_brief(tmp_path, change)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert key in captured.err
    assert nearest in captured.err


FINDINGS = {
    "indivisible heads": ({"claims.layout.tp": 6, "claims.layout.ep": 8}, "num_attention_heads = 16"),
    "experts that EP does not divide": ({"claims.layout.ep": 24}, "must divide"),
    "a world that is not the cluster's": ({"claims.layout.dp": 4}, "must equal the 512 GPUs"),
    "more stages than layers": ({"claims.layout.pp": 32}, "need a layer each"),
    "a batch that DP does not divide": (
        {"claims.layout.dp": 16, "workload.global_batch_size": 100},
        "100 sequences",
    ),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_an_impossible_layout_is_a_finding(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, rule = FINDINGS[name]
    assert main(["audit", changed_brief(tmp_path, change)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cannot exist" in out
    assert rule in out
