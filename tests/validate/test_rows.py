"""Reading a table of runs: typed cells, blanks, and one message for what is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.validate.run_rows import CARRIED, carried

from meshwright.errors import InputError
from meshwright.validate.rows import Row, columns, read_rows


def written(folder: Path, *records: dict[str, str], drop: tuple[str, ...] = ()) -> Path:
    path = folder / "runs.csv"
    names = [name for name in columns() if name not in drop]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    return path


def test_the_carried_rows_are_typed() -> None:
    row = carried()["MB-001"]
    assert (row.model, row.num_layers, row.num_experts, row.vpp, row.ep) == ("DeepSeek-V3", 61, 256, 8, 32)
    assert (row.gated, row.sequence_parallel, row.micro_batch_size) == (True, None, 1)
    assert (row.iteration_time_s, row.iteration_time_derived_s) == (None, 10.4224)
    assert carried()["SMX-001"].memory == 66.552
    assert len(carried()) == CARRIED.read_text().count("\n") - 1


def test_a_blank_cell_is_unknown(tmp_path: Path) -> None:
    (row,) = read_rows(written(tmp_path, {"id": "x"}))
    numbers = [name for name in Row.__slots__ if getattr(row, name) is None]
    assert {"num_layers", "memory", "gated", "year"} <= set(numbers)
    assert row.framework == ""


def test_missing_columns_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 columns missing.*lacks n_gpus, mbs"):
        read_rows(written(tmp_path, {"id": "x"}, drop=("n_gpus", "mbs")))


def test_other_columns_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    path.write_text(",".join([*columns(), "extra"]) + "\n" + "x" + "," * len(columns()) + "y\n")
    assert [row.id for row in read_rows(path)] == ["x"]


@pytest.mark.parametrize(
    ("column", "cell", "kind"),
    [
        ("layers", "many", "whole number"),
        ("layers", "1.5", "whole number"),
        ("layers", "-3", "whole number"),
        ("layers", "1e400", "whole number"),
        ("iteration_time_s", "nan", "positive number"),
        ("iteration_time_s", "inf", "positive number"),
        ("peak_mem_GB", "80 GB", "positive number"),
        ("peak_mem_GB", "0", "positive number"),
        ("peak_mem_GB", "1e-300", "positive number"),
        ("peak_mem_GB", "1e308", "positive number"),
        ("gated", "perhaps", "y or n"),
    ],
)
def test_a_wrong_cell_is_named_with_its_line(tmp_path: Path, column: str, cell: str, kind: str) -> None:
    path = written(tmp_path, {"id": "x"}, {"id": "y", column: cell})
    with pytest.raises(InputError, match=rf"line 3, column {column}.*a {kind}"):
        read_rows(path)


def test_an_id_names_one_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an id names one row"):
        read_rows(written(tmp_path, {"id": "x"}, {"id": "x"}))
    with pytest.raises(InputError, match="every row has an id"):
        read_rows(written(tmp_path, {"id": " "}))


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.csv", tmp_path / "binary.csv"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (empty, binary, tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(InputError):
            read_rows(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=300))
def test_no_text_is_more_than_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "any.csv"
    path.write_text(",".join(columns()) + "\n" + text, encoding="utf-8")
    try:
        rows = read_rows(path)
    except InputError:
        return
    assert all(row.id for row in rows)
