"""The plan command: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.planner.spaces import deployment

from meshwright.__main__ import main
from meshwright.plan import read_plan
from meshwright.planner.answer import plan_deployment
from meshwright.planner.request import Answered, Request, answered
from meshwright.terminal import rendered
from meshwright.terminal.plan import show_plans
from meshwright.terminal.wording import short_layout, short_policy

FILE = """
name: small
cluster: {nodes: 2, gpus_per_node: 8, gpu: h100-sxm}
model:
  {num_hidden_layers: 8, hidden_size: 1024, num_attention_heads: 16, vocab_size: 32000,
   num_experts: 16, num_experts_per_tok: 2, moe_intermediate_size: 768}
workload: {global_batch_size: 32, sequence_length: {min: 512, max: 2048}}
policy: {engine: megatron, dispatcher: alltoall, zero_stage: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(FILE)
    return str(path)


def test_the_table_shows_plans_parts_memory_and_all_that_is_taken(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", file, "--top", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 110
    for words in (
        "small: inline on 16 × h100-sxm",
        "legal candidates in",
        "at 512",
        "at 2,048",
        "Where the time goes",
        "Memory of the first",
        "Less memory, more time",
        "How sure",
        "Left out",
        "cluster.links",
        "workload.sequence_length",
        "engine.context",
    ):
        assert words in out, words
    ranks = [line.split()[0].rstrip("=") for line in out.splitlines()[4:] if line[:3].strip()[:1].isdigit()]
    assert ranks[:3] == ["1", "2", "3"]


def test_json_is_one_document(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", file, "--json", "--explain", "tp=4", "--scaling", "8,16", "--top", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    document = json.loads(out)
    assert len(document["plans"]) == 2
    assert document["explain"]["choices"] == {"layout.tp": 4}
    assert [row["gpus"] for row in document["scaling"]] == [8, 16]
    assert document["scaling"][0]["efficiency_fraction"] == 1
    assert document["plans"][0]["step_time_at_s"].keys() == {"512", "2048"}


def test_the_best_plan_is_written_and_can_be_planned_again(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    assert main(["plan", file, "-o", str(plan), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["plans"][0]
    assert read_plan(plan).digest == first["digest"]
    assert main(["plan", str(plan), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["legal"], again["plans"][0]["digest"]) == (1, first["digest"])
    assert main(["groups", str(plan)]) == 0


def test_without_a_file_what_was_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "qwen3-8b", "--gpu", "h100-sxm", "--gpus", "8", "--set", "policy.engine=megatron"]
    assert main(["plan", *arguments, "--set", "policy.recompute=full"]) == 0
    out, _ = capsys.readouterr()
    words = " ".join(out.split())
    assert "workload.global_batch_size 1024: not stated (--batch)" in words
    assert "workload.sequence_length 4096: not stated (--seq)" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --model: 'missing'"),
        (["FILE", "--gpus", "8"], "error: --gpus: 8: a file says it"),
        (["FILE", "--explain", "x=1"], "error: --explain: 'x'"),
        (["FILE", "--target", "soon"], "error: --target: 'soon'"),
        (["FILE", "--scaling", "12"], "error: --scaling: 12: whole nodes of 8 GPUs"),
        (["FILE", "--set", "layout.tp=3"], "error: layout: 'tp·cp·pp = 3'"),
        (["FILE", "-o", "FILE"], "would be overwritten"),
        (["nowhere.yaml"], "error: nowhere.yaml"),
        (["--gpus", "x"], "--gpus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *(file if word == "FILE" else word for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_nothing_fits_is_told_with_exit_code_0(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = "{name: tiny, memory: 4 GB, memory_bandwidth: 1 TB/s, peak: {bf16: 100 TFLOP/s}}"
    links = "[{name: node, kind: pcie, bandwidth: 30 GB/s, latency: 5 us}]"
    changes = ["--set", f"cluster.gpu={gpu}", "--set", f"cluster.links={links}", "--set", "cluster.nodes=1"]
    assert main(["plan", file, *changes, "--set", "layout.tp=1", "--set", "policy.recompute=none"]) == 0
    out, _ = capsys.readouterr()
    assert "Nothing fits." in out
    assert "too much" in out
    assert "candidates fit." in out or "Neither a fixed key" in out
    changes += ["--set", "layout.tp=1", "--set", "policy.recompute=none"]
    assert main(["plan", file, *changes, "--json", "-o", f"{file}.plan"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["feasible"] == 0
    assert err == f"note: no plan fits, so {file}.plan is not written\n"
    assert not Path(f"{file}.plan").exists()


def test_names_from_a_file_do_not_steer_the_terminal() -> None:
    given = deployment("moe", nodes=1, engine="megatron", recompute="none")
    evil = given.model_copy(update={"name": "a\x1b[31mb\nc"})
    answer = plan_deployment(evil, 2)
    text = rendered(lambda console: show_plans(Answered(answer, 2), console))
    assert "a?[31mb c" in text
    assert "\x1b" not in text


def test_every_answer_has_its_section() -> None:
    request = Request(
        file="examples/qwen3-30b-a3b-16.yaml", explain="tp=2", scaling="8,16", target="step_time <= 1 ms"
    )
    result = answered(request)
    text = rendered(lambda console: show_plans(result, console))
    for words in ("Why not tp=2", "Strong scaling", "Target step_time <= 1 ms", "not met", "come nearest"):
        assert words in text, words


def test_layouts_and_policies_in_a_few_words() -> None:
    plans = plan_deployment(deployment("moe", engine="megatron"), 20).plans
    for ranked in plans:
        layout, policy = ranked.plan.layout, ranked.plan.policy
        words = short_layout(ranked.plan).split()
        assert f"DP{layout.dp}" in words
        assert (f"TP{layout.tp}" in words) == (layout.tp > 1)
        assert f"mbs{policy.micro_batch_size}" in short_policy(ranked.plan).split()
        assert ("+ov" in short_policy(ranked.plan)) == (policy.expert_overlap and layout.ep > 1)
