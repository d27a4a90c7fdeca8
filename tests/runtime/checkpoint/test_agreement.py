"""What is wrong with a request is one message, the same on every rank, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.errors import MeshwrightError
from meshwright.runtime.checkpoint import Piece, Pieces, load, newest, save, survey, whole

from .conftest import Crew

F32 = torch.float32


def rows(start: int, stop: int, dtype: torch.dtype = F32, whole_rows: int = 8) -> Pieces:
    return Pieces((whole_rows, 2), dtype, (Piece((start, 0), torch.ones(stop - start, 2, dtype=dtype)),))


NOTHING = Pieces((8, 2), F32, ())


def said(act: Callable[[], Any]) -> str:
    with pytest.raises(MeshwrightError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([rows(0, 4), rows(4, 6), NOTHING], "a: 4 of its 16 elements are in no part"),
        ([NOTHING, NOTHING, NOTHING], "a: 16 of its 16 elements are in no part"),
        (
            [rows(0, 4), rows(3, 8), NOTHING],
            "a: parts [0:4, 0:2] and [3:8, 0:2] overlap without being equal",
        ),
        (
            [rows(0, 8), rows(0, 4), rows(4, 8)],  # the same offsets: DCP alone would drop one of them
            "a: parts [0:8, 0:2] and [0:4, 0:2] overlap without being equal",
        ),
        ([rows(0, 8), rows(0, 8), rows(8, 9)], "a: part [8:9, 0:2] leaves the shape (8, 2)"),
        (
            [rows(0, 8), NOTHING, Pieces((4, 4), F32, ())],
            "a: one rank has it as (8, 2) torch.float32, another as (4, 4) torch.float32",
        ),
        (
            [rows(0, 4), rows(4, 8), rows(4, 8, torch.float16)],
            "a: one rank has it as (8, 2) torch.float32, another as (8, 2) torch.float16",
        ),
        (
            [rows(0, 8), NOTHING, Pieces((8, 2), F32, (Piece((0, 0), torch.ones(8, 2).half()),))],
            "a: part [0:8, 0:2] is torch.float16, the tensor is torch.float32",
        ),
        (
            [rows(0, 8), NOTHING, Pieces((8, 2), F32, rows(0, 4).pieces * 2)],
            "a: one rank holds two parts that begin at the same place",
        ),
    ],
)
def test_parts_that_do_not_make_up_a_tensor(
    parts: list[Pieces], message: str, crew: Crew, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    messages = crew(3, lambda rank: said(lambda: save(tmp_path / "run", 1, {"a": parts[rank]}, {})))
    alternatives = {message, message.replace("[0:8, 0:2] and [0:4, 0:2]", "[0:4, 0:2] and [0:8, 0:2]")}
    assert len(set(messages)) == 1
    assert messages[0] in alternatives
    assert survey(tmp_path / "run") == []
    assert "Traceback" not in capfd.readouterr().err


def test_one_process_is_held_to_the_same_rules(tmp_path: Path) -> None:
    message = said(lambda: save(tmp_path, 1, {"a": rows(0, 4)}, {}))
    assert message == "a: 8 of its 16 elements are in no part"
    scalar = Pieces((), F32, ())
    assert said(lambda: save(tmp_path, 1, {"s": scalar}, {})) == "s: 1 of its 1 elements are in no part"


LOADS = [
    ({"a": rows(0, 8), "c": rows(0, 1)}, "c: the checkpoint has no such tensor"),
    (
        {"a": rows(0, 8, whole_rows=9), "b": rows(0, 8)},
        "a: the checkpoint has shape (8, 2), wanted is (9, 2)",
    ),
    ({"a": rows(0, 8, torch.float64)}, "a: the checkpoint has torch.float32, wanted is torch.float64"),
    ({"a": rows(8, 9)}, "a: part [8:9, 0:2] leaves the shape (8, 2)"),
]


@pytest.mark.parametrize(("state", "message"), LOADS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_wish_of_one_rank_is_refused_on_all(
    state: dict[str, Pieces], message: str, strict: bool, crew: Crew, tmp_path: Path
) -> None:
    path = save(tmp_path / "run", 1, {"a": rows(0, 8), "b": rows(0, 8)}, {})
    right = {"a": rows(0, 3), "b": rows(0, 8)}

    def act(rank: int) -> str:
        return said(lambda: load(path, state if rank == 1 else right, strict=strict))

    assert set(crew(3, act)) == {message}


def test_what_nobody_wants_is_refused_when_strict(crew: Crew, tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e", "f")
    path = save(tmp_path / "run", 1, {name: rows(0, 8) for name in names}, {"x": 1})

    def act(rank: int) -> tuple[str, dict[str, Any]]:
        state = {"ab"[rank]: NOTHING}
        return said(lambda: load(path, state)), load(path, state, strict=False)

    message = f"{path}: nothing wants its c, d, e and 1 more; not strict, they are ignored"
    assert {message for message, _ in crew(2, act)} == {message}
    assert [extra for _, extra in crew(2, act)] == [{"x": 1}] * 2


def test_ranks_must_mean_the_same_checkpoint(crew: Crew, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    messages = crew(2, lambda rank: said(lambda: save(folder, rank, {"a": rows(0, 8)}, {})))
    assert set(messages) == {"step: the ranks do not agree on it: 0, 1"}
    paths = [save(folder, step, {"a": rows(0, 8)}, {}) for step in (0, 1)]
    messages = crew(2, lambda rank: said(lambda: load(paths[rank], {"a": rows(0, 8)})))
    assert set(messages) == {"checkpoint: the ranks do not agree on it: 'step-00000000', 'step-00000001'"}
    assert crew(2, lambda _: newest(folder)) == [paths[1]] * 2


def test_the_first_ranks_extra_is_kept(crew: Crew, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def act(rank: int) -> dict[str, Any]:
        return load(save(folder, 1, {"a": rows(0, 8)}, {"rank": rank}), {"a": rows(0, 8)})

    assert crew(2, act) == [{"rank": 0}] * 2


def test_a_smaller_group_can_be_given(crew: Crew, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def act(rank: int) -> Any:
        group = torch.distributed.new_group([1, 2], backend="gloo")
        if rank == 0:
            return said(lambda: save(folder, 1, {"a": rows(0, 8)}, {}, process_group=group))
        half = rows(0, 4) if rank == 1 else rows(4, 8)
        path = save(folder, 1, {"a": half}, {"by": rank}, process_group=group)
        return load(path, {"a": rows(0, 8)}, process_group=group), newest(folder, process_group=group)

    first, *others = crew(3, act)
    assert first == "this rank is not one of the process group that was given"
    assert others == [({"by": 1}, folder / "step-00000001")] * 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"x": torch.zeros(1)}, "extra: Object of type Tensor is not JSON serializable"),
        ({"x": float("nan")}, "extra: Out of range float values are not JSON compliant"),
        ({1: 2}, "extra: JSON would not give it back equal"),
        ({"x": (1, 2)}, "extra: JSON would not give it back equal"),
    ],
)
def test_extra_that_would_not_come_back_is_refused(extra: Any, message: str, tmp_path: Path) -> None:
    assert said(lambda: save(tmp_path, 1, {"a": rows(0, 8)}, extra)).startswith(message)


@pytest.mark.parametrize(
    ("step", "keep", "message"),
    [
        (-1, None, "step: -1: a step is a whole number from 0"),
        (1.5, None, "step: 1.5: a step is a whole number from 0"),
        (1, 0, "keep: 0: at least one checkpoint is kept"),
    ],
)
def test_arguments_that_mean_nothing(step: Any, keep: Any, message: str, tmp_path: Path) -> None:
    assert said(lambda: save(tmp_path / "run", step, {"a": rows(0, 8)}, {}, keep=keep)) == message
    assert not (tmp_path / "run").exists()


def test_keep_removes_older_whole_checkpoints_only(tmp_path: Path) -> None:
    state = {"a": whole(torch.ones(2))}
    for step in (1, 2, 3, 9):
        save(tmp_path, step, state, {})
    (tmp_path / "step-00000002" / "COMMITTED").unlink()
    (tmp_path / "mine").mkdir()
    save(tmp_path, 4, state, {}, keep=2)  # 9 is a later step of another run: left alone, as is broken 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine",
        "step-00000002",
        "step-00000003",
        "step-00000004",
        "step-00000009",
    ]
    save(tmp_path, 5, state, {}, keep=1)
    assert [found.step for found in survey(tmp_path)] == [2, 5, 9]
    save(tmp_path, 123456789, state, {}, keep=1)
    assert newest(tmp_path) == tmp_path / "step-123456789"


def test_a_place_that_is_no_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").write_text("mine")
    message = said(lambda: save(tmp_path, 1, {"a": rows(0, 8)}, {}))
    assert message.endswith("step-00000001: not a folder, so no checkpoint can be saved there")
    message = said(lambda: save(tmp_path / "step-00000001", 1, {"a": rows(0, 8)}, {}))
    assert message.endswith("step-00000001: File exists")


def test_nothing_at_all_can_be_saved(tmp_path: Path) -> None:
    assert load(save(tmp_path, 0, {}, {"x": None}), {}) == {"x": None}
