"""A table's file: what is written is read back, and what is wrong is one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import MOE, small_deployment
from hypothesis import given
from hypothesis import strategies as st
from tables import table_for

from meshwright.__main__ import main
from meshwright.deployment import deployment_from
from meshwright.efficiency_table import (
    EfficiencyTable,
    Kernels,
    LinkPoint,
    OpPoint,
    read_table,
    table_text,
    write_table,
)
from meshwright.errors import InputError
from meshwright.files import parse_yaml, to_yaml
from meshwright.machine import Machine, this_machine
from meshwright.plan import Plan, read_plan, resolve, write_plan

SECONDS = st.floats(1e-9, 1e3)
SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=6).map(tuple)
POINTS = st.builds(
    OpPoint,
    op=st.sampled_from(["matmul", "norm", "optimizer"]),
    phase=st.sampled_from(["forward", "input_gradient", "weight_gradient", "step"]),
    sizes=SIZES,
    time_s=SECONDS,
    spread=st.floats(0, 10),
    samples=st.integers(1, 1000),
)
LINKS = st.builds(
    LinkPoint,
    collective=st.sampled_from(["all_reduce", "send_recv"]),
    ranks=st.integers(2, 64),
    bytes=st.integers(1, 10**9),
    time_s=SECONDS,
)
KERNELS = st.builds(
    Kernels,
    ranks=st.integers(1, 8),
    threads=st.integers(1, 8),
    precision=st.sampled_from(["fp32", "bf16"]),
    host_s=st.fixed_dictionaries({"dense": SECONDS, "experts": SECONDS}),
    step_s=st.floats(0, 1),
    points=st.lists(POINTS, min_size=1, max_size=5).map(tuple),
)
TABLES = st.builds(
    EfficiencyTable,
    machine=st.builds(
        Machine,
        processor=st.text(min_size=1, max_size=20),
        processors=st.integers(1, 256),
        memory_bytes=st.integers(1, 10**13),
    ),
    date=st.dates().map(str),
    subject=st.text(max_size=20),
    wall_s=SECONDS,
    kernels=st.lists(KERNELS, min_size=1, max_size=2).map(tuple),
    links=st.lists(LINKS, max_size=3).map(tuple),
)


def plan() -> Plan:
    """A plan of one rank with experts."""
    return resolve(deployment_from(small_deployment(MOE), Path()))


@given(table=TABLES)
def test_a_table_is_read_back_as_it_was_written(table: EfficiencyTable) -> None:
    assert EfficiencyTable.model_validate(parse_yaml(table_text(table))) == table


def test_a_file_holds_the_table(tmp_path: Path) -> None:
    table = table_for(plan())
    write_table(table, tmp_path / "here.yaml")
    assert read_table(tmp_path / "here.yaml") == table
    assert read_table(tmp_path / "here.yaml").digest == table.digest
    assert table.digest != table_for(plan(), seconds=lambda shape: 1e-3).digest


def test_the_machine_at_hand_is_here_and_no_other_is() -> None:
    here = this_machine()
    assert here.is_here
    assert here.processors >= 1
    assert this_machine(gpu="H100").is_here
    assert not here.model_copy(update={"processor": "abacus"}).is_here
    assert not here.model_copy(update={"processors": here.processors + 1}).is_here


def test_a_plan_with_a_table_is_the_same_plan(tmp_path: Path) -> None:
    before = plan()
    cluster = before.cluster.model_copy(update={"calibration": table_for(before)})
    after = before.model_copy(update={"cluster": cluster})
    assert after.digest == before.digest
    write_plan(after, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == after


BAD: dict[str, tuple[str, Any, str]] = {
    "no time": ("kernels[0].points[0].time_s", 0, "seconds above 0"),
    "words for sizes": ("kernels[0].points[0].sizes", "4x", "512x128x256"),
    "an unknown phase": ("kernels[0].points[0].phase", "sideways", "input_gradient"),
    "one rank alone": ("links[0].ranks", 1, "at least two ranks"),
    "no host cost of experts": ("kernels[0].host_s", {"dense": 0.0}, "blocks of both kinds"),
    "no points": ("kernels[0].points", [], "at least one op"),
    "nothing measured": ("kernels", [], "at least the kernels of one rank"),
    "an unknown key": ("machine.colour", "blue", "machine.colour"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_one_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, value, words = BAD[name]
    file, table = tmp_path / "small.yaml", tmp_path / "table.yaml"
    file.write_text(to_yaml(small_deployment(MOE)), "utf-8")
    document = parse_yaml(table_text(table_for(plan())))
    put(document, key, value)
    table.write_text(to_yaml(document), "utf-8")
    assert main(["simulate", str(file), "--calibration", str(table)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert len(said.err.strip().splitlines()) == 1


def put(document: Any, key: str, value: Any) -> None:
    """Set a key's path."""
    *steps, last = key.replace("[", ".").replace("]", "").split(".")
    for step in steps:
        document = document[int(step)] if step.isdigit() else document[step]
    document[last] = value


def test_a_table_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(small_deployment(MOE)), "utf-8")
    write_table(table_for(plan()), tmp_path / "here.yaml")
    assert main(["simulate", str(file), "--calibration", str(tmp_path / "hre.yaml")]) == 2
    said = capsys.readouterr().err
    assert "hre.yaml" in said
    assert "here.yaml" in said


def test_another_number_type_is_refused() -> None:
    with pytest.raises(InputError, match="measured other number types") as caught:
        table_for(plan()).kernels_of("bf16", 1)
    assert caught.value.nearest == ("fp32",)


def test_the_kernels_of_the_nearest_number_of_ranks_are_taken() -> None:
    table = table_for(plan())
    two = table.kernels[0].model_copy(update={"ranks": 2})
    both = table.model_copy(update={"kernels": (*table.kernels, two)})
    assert [both.kernels_of("fp32", ranks).ranks for ranks in (1, 2, 8)] == [1, 2, 2]
