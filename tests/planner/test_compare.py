"""The best plan beside another layout: the same prices, ties by overlap, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.planner.test_command import FILE

from meshwright.__main__ import main
from meshwright.deployment import Deployment, deployment_from
from meshwright.errors import InputError
from meshwright.files import parse_yaml, to_yaml
from meshwright.plan import Plan
from meshwright.planner.answer import plan_deployment
from meshwright.planner.compare import Compared, Pair, Timed, compare, other_plan, parse_lengths
from meshwright.planner.interval import interval
from meshwright.planner.request import Request, answered
from meshwright.simulator.options import Options
from meshwright.simulator.simulate import simulate

OTHER: dict[str, Any] = {
    "name": "by-hand",
    "layout": {"tp": 4, "pp": 2, "ep": 8},
    "policy": {"engine": "megatron", "micro_batch_size": 2, "recompute": "full"},
}


def document(**changes: Any) -> dict[str, Any]:
    return {**parse_yaml(FILE, "small.yaml"), **changes}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A deployment to plan, and another layout of it."""
    mine, other = tmp_path / "small.yaml", tmp_path / "other.yaml"
    mine.write_text(FILE)
    other.write_text(to_yaml(document(**OTHER)))
    return str(mine), str(other)


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return deployment_from(document(), Path())


@pytest.fixture(scope="module")
def compared(deployment: Deployment, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    path = tmp_path_factory.mktemp("compare") / "other.yaml"
    path.write_text(to_yaml(document(**OTHER)))
    best = plan_deployment(deployment, 1).best
    assert best is not None
    return compare("by-hand", best, other_plan(str(path), deployment), [512, 1024, 2048])


def test_both_sides_are_what_the_simulation_says(compared: Compared) -> None:
    plans: tuple[Plan, Plan] = (compared.planned.plan, compared.against.plan)
    assert plans[1].layout.tp == 4
    assert plans[1].policy.recompute == "full"
    for pair in compared.pairs:
        assert pair.sequence_length is not None
        for timed, plan in zip((pair.planned, pair.against), plans, strict=True):
            seconds = simulate(plan, Options(sequence_length=pair.sequence_length)).step_time_s
            assert timed.step_time_s == pytest.approx(seconds, rel=1e-9)
            assert (timed.low_s, timed.high_s) == pytest.approx(interval(plan, seconds), rel=1e-9)
        assert pair.ratio == pytest.approx(pair.against.step_time_s / pair.planned.step_time_s)


def test_the_mean_is_that_which_plans_are_ranked_by(compared: Compared) -> None:
    assert compared.mean.sequence_length is None
    assert compared.mean.planned.step_time_s == compared.planned.step_time_s
    lengths = compared.planned.lengths.shares
    other = compared.against.plan
    by_hand = sum(s * simulate(other, Options(sequence_length=n)).step_time_s for n, s in lengths)
    assert compared.mean.against.step_time_s == pytest.approx(by_hand, rel=1e-9)


def test_nothing_that_fits_is_faster_on_that_mean(compared: Compared) -> None:
    assert compared.against.fits
    assert compared.mean.ratio >= 1


@pytest.mark.parametrize(
    ("planned", "against", "faster"),
    [
        ((10, 8, 12.5), (16, 12.8, 20), "planned"),  # 12.5 < 12.8
        ((10, 8, 12.5), (15, 12, 18.75), None),  # 12 < 12.5: they overlap
        ((10, 8, 12.5), (15.625, 12.5, 19.5), None),  # they touch
        ((16, 12.8, 20), (10, 8, 12.5), "against"),
        ((10, 8, 12.5), (10, 8, 12.5), None),
    ],
)
def test_a_tie_is_an_overlap_of_intervals(
    planned: tuple[float, ...], against: tuple[float, ...], faster: str | None
) -> None:
    pair = Pair(1024, Timed(*planned), Timed(*against))
    assert pair.faster == faster
    assert pair.tie is (faster is None)
    assert pair.document()["faster"] == faster


def test_lengths_are_read_in_order_and_once(deployment: Deployment) -> None:
    workload = deployment.workload
    assert parse_lengths("2048, 512,1024,512", workload) == [512, 1024, 2048]
    assert parse_lengths(None, workload) == [512, 2048]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("256", "512 to 2,048 tokens"),
        ("4096", "512 to 2,048 tokens"),
        ("700", "multiples of 512 tokens"),
        ("1k", "numbers of tokens"),
        ("", "numbers of tokens"),
        ("-512", "numbers of tokens"),
        (",".join(str(512 + n) for n in range(33)), "at most 32"),
    ],
)
def test_lengths_that_cannot_be_compared_are_refused(text: str, rule: str, deployment: Deployment) -> None:
    with pytest.raises(InputError, match=rule):
        parse_lengths(text, deployment.workload)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workload": {"global_batch_size": 64, "sequence_length": 2048}}, "not the same workload"),
        ({"cluster": {"nodes": 4, "gpus_per_node": 8, "gpu": "h100-sxm"}}, "cluster.nodes is 4 there and 2"),
        ({"model": "qwen3-8b"}, "not the same model"),
        ({"layout": {"tp": 3}}, "must divide the 16 GPUs"),
        ({"layout": {"tp": 4, "ep": 64}}, "ep"),
        ({"policy": {"engine": "megatron", "zero_stage": 3}}, "zero_stage"),
    ],
)
def test_another_job_or_an_illegal_layout_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path, deployment: Deployment
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(to_yaml(document(**{**OTHER, **change})))
    with pytest.raises(InputError, match=words):
        other_plan(str(path), deployment)


def test_the_command_prints_the_table(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = files
    assert main(["plan", mine, "--against", other, "--lengths", "512,1024,2048"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 110
    table = out.split("The planned layout against by-hand")[1]
    for words in ("planned: ", "by-hand: TP4 PP2 EP8 DP2", "mean", "ratio: by-hand over planned"):
        assert words in table, words
    rows = [
        line.split() for line in table.splitlines() if line.split()[:1] in (["512"], ["1,024"], ["2,048"])
    ]
    assert len(rows) == 3
    assert {row[-1] for row in rows} <= {"planned", "by-hand", "tie"}
    some_tie = any(row[-1] == "tie" for row in rows)
    assert ("tie: the intervals overlap" in table) == some_tie
    assert ("the two are apart" in table) != some_tie
    assert "Not in by-hand, taken:" in table


def test_json_has_a_pair_for_each_length(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = files
    assert main(["plan", mine, "--against", other, "--json", "--top", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    against = found["against"]
    assert [pair["sequence_length"] for pair in against["lengths"]] == [512, 2048]
    assert against["layout"]["tp"] == 4
    assert against["fits"] is True
    at_ends = found["plans"][0]["step_time_at_s"]
    for pair in against["lengths"]:
        planned, other_side = pair["planned"], pair["against"]
        assert planned["step_time_s"] == at_ends[str(pair["sequence_length"])]
        lows = [side["step_time_low_s"] for side in (planned, other_side)]
        highs = [side["step_time_high_s"] for side in (planned, other_side)]
        assert max(lows) < min(highs) if pair["tie"] else max(lows) > min(highs)


def test_a_plan_file_can_be_compared_with(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best plan against itself: every ratio is 1, and everything ties."""
    mine, _ = files
    written = str(tmp_path / "plan.yaml")
    assert main(["plan", mine, "-o", written, "--json"]) == 0
    capsys.readouterr()
    assert main(["plan", mine, "--against", written, "--json"]) == 0
    against = json.loads(capsys.readouterr().out)["against"]
    assert {pair["ratio"] for pair in (*against["lengths"], against["mean"])} == {1.0}
    assert all(pair["tie"] for pair in against["lengths"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "512"], "error: --lengths: 512"),
        (["--against", "OTHER", "--lengths", "9"], "error: --lengths: 9"),
        (["--against", "nowhere.yaml"], "error: nowhere.yaml"),
        (["--against", "OTHER", "-o", "OTHER"], "would be overwritten"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = files
    assert main(["plan", mine, *(other if word == "OTHER" else word for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words.replace("--lengths: 512", "--lengths: '512'") in err
    assert err.count("\n") == 1


def test_where_nothing_fits_there_is_nothing_to_compare(files: tuple[str, str], tmp_path: Path) -> None:
    mine, other = files
    gpu = {"name": "tiny", "memory": "3 GB", "memory_bandwidth": "1 TB/s", "peak": {"bf16": "100 TFLOP/s"}}
    links = [{"name": "all", "kind": "ib", "bandwidth": "50 GB/s", "latency": "5 us"}]
    small = document(cluster={"nodes": 2, "gpus_per_node": 8, "gpu": gpu, "links": links})
    Path(mine).write_text(to_yaml({**small, "layout": {"tp": 1, "pp": 1}}))
    Path(other).write_text(to_yaml({**small, **OTHER}))
    result = answered(Request(file=mine, against=other))
    assert result.answer.best is None
    assert result.compared is None
    assert "against" not in result.document()
