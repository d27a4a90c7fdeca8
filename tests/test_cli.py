"""The command line: what it prints where, how it refuses, and how fast it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import meshwright
from meshwright import cli, delivery
from meshwright.__main__ import main
from meshwright.errors import MeshwrightError
from meshwright.files import read_yaml, to_yaml

SOURCE = Path(meshwright.__file__).parent.parent

DEPLOYMENT = """
name: small
cluster: {nodes: 2, gpus_per_node: 8, gpu: h100-sxm}
model:
  {num_hidden_layers: 4, hidden_size: 64, num_attention_heads: 8, vocab_size: 256,
   num_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 32}
workload: {global_batch_size: 7, sequence_length: 63}
layout: {tp: 2, pp: 2, ep: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(DEPLOYMENT)
    return str(path)


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "meshwright"]), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=60, check=False
    )


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for command in ("audit", "groups", "plan", "validate", "schema"):
            assert f"\n  {command} " in out
        assert "completion" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshwright {meshwright.__version__}\n"


LOADED = """
import sys
from meshwright.__main__ import main
code = main(sys.argv[1:])
print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], {"torch", "numpy", "pydantic", "rich", "yaml"}),
        (["schema"], {"torch", "numpy", "rich"}),
        (["groups", "FILE"], {"torch", "numpy"}),
        (["groups", "FILE", "--rank", "3"], {"torch", "numpy"}),
        (["groups", "FILE", "--json"], {"torch", "numpy", "rich"}),
        (
            ["plan", "FILE", "--json", "--set", "workload={global_batch_size: 8, sequence_length: 64}"],
            {"torch", "rich"},
        ),
    ],
)
def test_commands_load_only_what_they_need(arguments: list[str], unwanted: set[str], file: str) -> None:
    done = process(*[file if word == "FILE" else word for word in arguments], code=LOADED)
    assert done.returncode == 0
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "meshwright" in loaded
    assert not loaded & unwanted


def test_groups_prints_both_views_and_every_default(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the batch does not divide: groups need the cluster and the layout only."""
    assert main(["groups", file]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "small: 16 ranks on 2 × 8 h100-sxm" in out
    assert "dense view: tp·cp·dp·pp = 2·1·4·2 = 16" in out
    assert "expert view: etp·ep·edp·pp = 1·4·2·2 = 16" in out
    for key in ("cluster.links", "layout.cp", "layout.vpp", "layout.etp", "layout.dp"):
        assert f" {key} " in out
    assert "\x1b" not in out


def test_groups_as_json_is_one_document(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", file, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    document = json.loads(out)
    assert list(document) == ["world_size", "dense", "expert"]
    assert list(document["dense"]) == ["tp", "cp", "dp", "pp"]
    assert list(document["expert"]) == ["etp", "ep", "edp", "pp"]
    assert document["expert"]["ep"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert "default: layout.dp = 4: 16 GPUs / (tp·cp·pp = 4)" in err.splitlines()


def test_groups_need_a_cluster_and_a_layout_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.yaml"
    small.write_text("cluster: {nodes: 2, gpu: h100-sxm}\nlayout: {tp: 2, pp: 2, ep: 4}\n")
    assert main(["groups", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expert"]["ep"][0] == [0, 1, 2, 3]
    assert main(["groups", str(small), "--rank", "3"]) == 2  # what a rank holds depends on the model
    assert "model" in capsys.readouterr().err


def test_warnings_are_printed(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["groups", file, "--set", "layout.tp=16", "--set", "layout.pp=1"]
    assert main(arguments) == 0
    text = "warning: layout.tp: 16: its groups leave the node tier of 8 GPUs"
    assert text in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert text in err


def test_groups_of_one_rank(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", file, "--rank", "13"]) == 0
    assert "small: rank 13 of 16, node 1, GPU 5" in capsys.readouterr().out
    assert main(["groups", file, "--rank", "13", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["coordinates"]["dense"] == {"tp": 1, "cp": 0, "dp": 2, "pp": 1}
    assert document["num_sequences"] is None


def test_overrides_change_the_file(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", file, "--json", "--set", "layout.ep=8", "--set", "layout.pp=1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["expert"]["ep"] == [list(range(8)), list(range(8, 16))]
    assert document["expert"]["pp"] == [[rank] for rank in range(16)]


def test_output_holds_what_would_be_printed(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--json"], ["--rank", "3"]):
        assert main(["groups", file, *flags]) == 0
        printed = capsys.readouterr().out
        target = tmp_path / "out.txt"
        assert main(["groups", file, *flags, "-o", str(target)]) == 0
        assert capsys.readouterr().out == ""
        assert target.read_text("utf-8") == printed


def test_a_refused_command_leaves_the_output_alone(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.txt"
    target.write_text("kept")
    assert main(["groups", file, "--set", "layout.ep=3", "-o", str(target)]) == 2
    assert target.read_text() == "kept"
    assert main(["groups", file, "-o", file]) == 2
    assert Path(file).read_text() == DEPLOYMENT
    assert "would be overwritten" in capsys.readouterr().err


def test_schema_describes_deployment_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    document = json.loads(printed)
    assert document["$schema"].endswith("2020-12/schema")
    assert {"cluster", "model", "workload", "layout", "policy", "claims"} <= set(document["properties"])
    assert main(["schema", "-o", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text("utf-8") == printed


def test_the_schema_takes_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert main(["schema"]) == 0
    validator = jsonschema.Draft202012Validator(json.loads(capsys.readouterr().out))
    examples = sorted((SOURCE.parent / "examples").glob("*.yaml"))
    assert examples
    for example in examples:
        assert [error.message for error in validator.iter_errors(read_yaml(example))] == [], example
    assert not validator.is_valid({**read_yaml(examples[0]), "layuot": {}})


REFUSED: dict[str, tuple[list[str], str]] = {
    "no such file": (["groups", "missing.yaml"], "missing.yaml: "),
    "a directory": (["groups", "DIRECTORY"], "a file is needed"),
    "not YAML": (["groups", "BROKEN"], "must be YAML or JSON"),
    "another world": (
        ["groups", "FILE", "--set", "layout.dp=3"],
        "layout.dp: 3: tp·cp·dp·pp = 12 must equal",
    ),
    "a world that does not divide": (["groups", "FILE", "--set", "layout.tp=3"], "must divide the 16 GPUs"),
    "ep that does not divide": (["groups", "FILE", "--set", "layout.ep=3"], "layout.ep: 3: "),
    "etp that does not divide": (["groups", "FILE", "--set", "layout.etp=3"], "layout.etp: 3: "),
    "a rank outside the world": (["groups", "FILE", "--rank", "16"], "rank: 16: "),
    "a rank below zero": (["groups", "FILE", "--rank", "-1"], "rank: -1: "),
    "a rank that is no number": (["groups", "FILE", "--rank", "one"], "--rank: 'one': a rank is a whole"),
    "a rank of too many digits": (["groups", "FILE", "--rank", "9" * 5000], "--rank: '999"),
    "standard input": (["audit", "-"], "FILE: '-': standard input is not read"),
    "an item of a list as a key": (
        ["groups", "FILE", "--set", "cluster.links=[{name: a}]", "--set", "cluster.links.0.kind=ib"],
        "(nearest: cluster.links[0].kind)",
    ),
    "no such model file": (
        ["groups", "FILE", "--set", "model={config: nope.json}"],
        "model.config: 'nope.json': the file cannot be read (",
    ),
    "a model that does not divide": (
        ["groups", "FILE", "--rank", "0", "--set", "model.num_experts=6"],
        "layout.ep: 4: must divide num_experts = 6",
    ),
    "more stages than layers": (
        [
            "groups",
            "FILE",
            "--rank",
            "0",
            "--set",
            "layout.pp=8",
            "--set",
            "layout.tp=1",
            "--set",
            "layout.ep=2",
        ],
        "layout.pp: 8: ",
    ),
    "an override without a value": (["groups", "FILE", "--set", "layout.tp"], "--set: "),
    "an override of no key": (["groups", "FILE", "--set", "=3"], "--set: "),
    "an override that is not YAML": (["groups", "FILE", "--set", "layout.tp=["], "--set layout.tp"),
    "an override with a line break": (["groups", "FILE", "--set", "name\n\x1b[2J=1"], "--set: "),
    "an unknown key": (
        ["groups", "FILE", "--set", "layout.tpp=3"],
        "layout.tpp: 3: unknown key (nearest: tp",
    ),
    "a zero": (["groups", "FILE", "--set", "layout.tp=0"], "layout.tp: 0: "),
    "a huge number": (["groups", "FILE", "--set", f"layout.tp=1{'0' * 40}"], "layout.tp: 1000"),
    "an output that cannot be": (["groups", "FILE", "-o", "DIRECTORY/no/such/file"], "cannot be written"),
    "an output that is a directory": (["groups", "FILE", "-o", "DIRECTORY"], "a file name is needed"),
    "an unknown command": (["grups"], "No such command 'grups'"),
    "an unknown flag": (["groups", "FILE", "--jsn"], "--jsn"),
    "no file": (["groups"], "Missing argument 'FILE'"),
    "two files": (["groups", "FILE", "FILE"], "unexpected extra argument"),
    "audit of no such file": (["audit", "missing.yaml", "--strict"], "missing.yaml: "),
    "audit with a bad override": (["audit", "FILE", "--set", "layout.tp"], "--set: "),
    "audit of an unknown key": (["audit", "FILE", "--set", "polcy.engine=native"], "polcy"),
    "schema of a file": (["schema", "FILE"], "unexpected extra argument"),
}


def filled(arguments: list[str], file: str, tmp_path: Path) -> list[str]:
    broken = tmp_path / "broken.yaml"
    broken.write_text("cluster: {nodes: [")
    names = {"FILE": file, "BROKEN": str(broken)}
    return [names.get(word, word.replace("DIRECTORY", str(tmp_path))) for word in arguments]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_in_one_line(
    name: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, text = REFUSED[name]
    assert main(filled(arguments, file, tmp_path)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert text in err


def test_the_process_refuses_as_main_does(file: str) -> None:
    done = process("groups", file, "--set", "layout.ep=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_is_no_error(file: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    environment.pop("PYTHONUNBUFFERED", None)
    big = ["--set", "cluster.nodes=16384", "--set", "layout.tp=8"]
    command = [sys.executable, "-m", "meshwright", "groups", file, "--json", *big]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.read(10)
        writer.stdout.close()
        said = writer.stderr.read().decode()
        assert writer.wait() == delivery.BROKEN_PIPE
    assert said == ""


@pytest.mark.parametrize("arguments", [["groups", "FILE"], ["schema"], ["--version"], ["--help"]])
def test_an_output_with_no_room_is_no_defect(arguments: list[str], file: str) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    command = [sys.executable, "-m", "meshwright", *(file if word == "FILE" else word for word in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with full.open("w") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_output_is_no_defect(file: str, tmp_path: Path) -> None:
    meshwright_in_shell = f'"{sys.executable}" -m meshwright'
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    for arguments, code in (("groups", 2), (f'groups -o "{tmp_path / "out"}"', 0), ("groups --rank x", 2)):
        command = f'{meshwright_in_shell} {arguments} "{file}" >&-'
        done = subprocess.run(
            ["sh", "-c", command],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            timeout=60,
            check=False,
        )
        assert done.returncode == code
        assert done.stderr.count("\n") == (code == 2)
        assert "defect" not in done.stderr
    quiet = ["sh", "-c", f"{meshwright_in_shell} groups missing.yaml 2>&-"]
    silent = subprocess.run(quiet, stdout=subprocess.PIPE, env=environment, timeout=60, check=False)
    assert (silent.returncode, silent.stdout) == (2, b"")


def test_help_cuts_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


ESCAPES = "T\x1b[2J\x1b]0;title\x07\x9b31m\u202e"


@pytest.mark.parametrize("flags", [[], ["--full"]])
def test_an_audit_never_steers_the_terminal(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = read_yaml(SOURCE.parent / "examples" / "brief.yaml")
    claims = document["claims"]
    stated = claims["figures"]
    for figures, value in ((stated, "0-127"), ([], "0-127"), (stated, ESCAPES)):
        claims["document"] = ESCAPES if figures else ""
        document["name"] = ESCAPES
        document["cluster"]["gpu"]["name"] = ESCAPES
        document["cluster"]["links"][0]["name"] = ESCAPES
        claims["assumptions"] = {f"model.{ESCAPES}": ESCAPES}
        claims["figures"] = [
            *({**figure, "where": ESCAPES} for figure in figures),
            {"id": "stage_ranks", "value": [value, "0-127"], "where": ESCAPES},
            {"id": "head_dim", "value": 64, "formula": "8 *\t8"},
            {"id": "world_size", "value": 512, "formula": "8 *\t8"},
        ]
        file = tmp_path / "hostile.yaml"
        file.write_text(to_yaml(document), "utf-8")
        code = main(["audit", str(file), *flags])
        out, err = capsys.readouterr()
        assert code == 0 or value == ESCAPES, err  # such a value may be refused, in one harmless line
        for sign in "\x1b\x07\x9b\u202e\t":
            assert sign not in out
            assert sign not in err


def test_an_audit_answers_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(SOURCE.parent / "examples" / "brief.yaml")]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "Optimized Parallel Deployment Method for 30B MoE Model"
    assert lines[0].startswith("Layout TP8 PP4 DP4 EP16 cannot exist on 512 GPUs: layout.dp 4: ")
    text = " ".join(lines)
    assert "(nearest: 16). Nearest that can: DP 4 -> 16 (" in text
    assert text.index("Nearest that can") < text.index("stated figures: ") < text.index("✗ parameters")
    assert "world_size 512 (its formula gives 2,048) (x2): " in text
    assert "micro-batch  changes" in text


def test_full_memory_lines_give_the_reason_of_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(SOURCE.parent / "examples" / "brief.yaml"), "--full"]) == 0
    assert "4/3/2/1 micro-batches in flight under 1F1B" in capsys.readouterr().out


def test_a_layout_that_does_not_fit_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    brief = str(SOURCE.parent / "examples" / "brief.yaml")
    assert main(["audit", brief, "--set", "cluster.gpu.memory=2 GB"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert " GB !" in out
    assert "! does not fit in the 2 GB of a GPU" in out


def raising(error: BaseException) -> Any:
    def read(*arguments: Any) -> None:
        raise error

    return read


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MeshwrightError("deepspeed does not\ndo this"), 2, "error: deepspeed does not do this\n"),
        (
            ZeroDivisionError("by\nzero"),
            3,
            "error: a defect of meshwright, ZeroDivisionError: by zero (see where",
        ),
    ],
)
def test_what_goes_wrong_inside(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "read", raising(error))
    monkeypatch.delenv("MESHWRIGHT_TRACEBACK", raising=False)
    assert main(["groups", "file"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said) if said else err == ""
    assert err.count("\n") <= 1


def test_a_defect_can_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "read", raising(ZeroDivisionError()))
    monkeypatch.setenv("MESHWRIGHT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["groups", "file"])


def test_an_encoding_without_the_signs_still_prints(file: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "meshwright", "groups", file]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"16 ranks on 2 ? 8 h100-sxm" in done.stdout
