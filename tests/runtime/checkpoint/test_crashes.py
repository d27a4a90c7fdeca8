"""A save that dies at any moment leaves a whole checkpoint, or one that is known not to be whole."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meshwright.errors import MeshwrightError
from meshwright.runtime.checkpoint import Pieces, load, newest, save, survey, whole
from meshwright.runtime.checkpoint import folder as disk

from .conftest import DIED, Crew

OLD, NEW = 1, 3


def state(step: int) -> dict[str, Pieces]:
    values = torch.arange(12.0).reshape(3, 4) + step
    return {"a": whole(values), "b": whole(values[:, 0] * step)}


class Interposed:
    """Tells what a process does to the disk, before it does it; a write is told when half of it is done."""

    CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        for name in self.CALLS:
            self._patch.setattr(os, name, self._telling(name, getattr(os, name)))
        real_open, real_write = builtins.open, disk.HashedStream.write

        def opening(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode == "wb":
                self._tell("open", path)
            return real_open(path, mode, *args, **kwargs)

        def writing(stream: disk.HashedStream, data: bytes | memoryview) -> int:
            half = len(data) // 2
            real_write(stream, data[:half])
            stream.flush()
            self._tell("write", None)
            return half + real_write(stream, data[half:])

        self._patch.setattr(builtins, "open", opening)
        self._patch.setattr(disk.HashedStream, "write", writing)

    def _telling(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._tell(name, args[0])
            return real(*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def die_at(kind: str, number: int) -> Interposed:
    """Die at the first, second … call of a kind."""
    seen = 0

    def tell(name: str, _: Any) -> None:
        nonlocal seen
        seen += name == kind
        if seen == number and name == kind:
            os._exit(DIED)

    return Interposed(tell)


def begin(folder: Path) -> None:
    """An old checkpoint, and what is left of a save of the new step that died."""
    save(folder, OLD, state(OLD), {"step": OLD})
    broken = save(folder, NEW, state(NEW + 10), {"step": NEW})
    (broken / disk.MARKER).unlink()


def check_what_is_left(folder: Path) -> None:
    path = newest(folder)
    assert path is not None
    step = int(path.name.removeprefix("step-"))
    assert step in (OLD, NEW)
    wanted = {
        name: whole(torch.zeros(pieces.shape, dtype=pieces.dtype)) for name, pieces in state(step).items()
    }
    assert load(path, wanted) == {"step": step}
    for name, pieces in state(step).items():
        assert torch.equal(wanted[name].pieces[0].tensor, pieces.pieces[0].tensor)


def go_on(folder: Path) -> None:
    """A run that starts again can save the same step, and the next one leaves no remains."""
    path = newest(folder)
    assert path is not None
    if path == disk.step_folder(folder, NEW):
        with pytest.raises(MeshwrightError, match="a whole checkpoint of step 3 is there already"):
            save(folder, NEW, state(NEW), {}, keep=1)
    else:
        save(folder, NEW, state(NEW), {}, keep=1)
    last = save(folder, NEW + 1, state(NEW + 1), {}, keep=1)
    assert list(folder.iterdir()) == [last]


@pytest.mark.parametrize("kind", ["open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"])
def test_dying_at_any_moment_loses_nothing(kind: str, crew: Crew, tmp_path: Path) -> None:
    number, died = 0, True
    while died:
        number += 1
        folder = tmp_path / f"{kind}-{number}"
        begin(folder)

        def act(_: int, folder: Path = folder, number: int = number) -> str:
            with die_at(kind, number):
                save(folder, NEW, state(NEW), {"step": NEW}, keep=1)
            return "done"

        died = crew(1, act) == [None]
        check_what_is_left(folder)
        go_on(folder)
    assert number > 1, f"nothing was done of kind {kind}"


@pytest.mark.parametrize("loser", [0, 1])
@pytest.mark.parametrize("kind", ["open", "fsync"])
def test_the_others_are_told_when_a_rank_dies(kind: str, loser: int, crew: Crew, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, OLD, state(OLD), {"step": OLD})

    def act(rank: int) -> str:
        with die_at(kind, 1) if rank == loser else die_at("", 0):
            try:
                save(folder, NEW, part(rank), {"step": NEW}, keep=1)
            except MeshwrightError as error:
                return str(error)
        return "done"

    def part(rank: int) -> dict[str, Pieces]:
        return {f"{name}.{rank}": pieces for name, pieces in state(NEW).items()}

    (left,) = [message for message in crew(2, act) if message is not None]
    assert left == f"saving step {NEW} to {folder}: another rank does not answer"
    check_what_is_left(folder)
    assert newest(folder) == disk.step_folder(folder, OLD)


def test_a_full_disk_on_one_rank_is_the_same_error_on_all(crew: Crew, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, OLD, state(OLD), {})

    def act(rank: int) -> str:
        def tell(name: str, _: Any) -> None:
            if rank == 2 and name == "write":
                raise OSError(errno.ENOSPC, "No space left on device")

        with Interposed(tell), pytest.raises(MeshwrightError) as caught:
            save(folder, NEW, {f"a.{rank}": whole(torch.ones(4))}, {})
        return str(caught.value)

    assert set(crew(4, act)) == {f"saving step {NEW} to {folder}: No space left on device"}
    assert [(found.step, found.problem) for found in survey(folder)] == [(OLD, None)]


def test_the_marker_is_written_after_all_else_is_on_the_disk(tmp_path: Path) -> None:
    events: list[tuple[str, Any]] = []

    def tell(name: str, what: Any) -> None:
        if name == "fsync":
            events.append((name, os.fstat(what).st_ino))
        elif name == "open":
            events.append((name, Path(what).name))

    with Interposed(tell):
        path = save(tmp_path, NEW, state(NEW), {})
    inode = {file.name: file.stat().st_ino for file in path.iterdir()}
    marker = events.index(("open", disk.MARKER))
    others = [events.index(("fsync", inode[name])) for name in inode if name != disk.MARKER]
    assert len(others) == 4
    last = max(others)
    assert last < marker
    assert ("fsync", path.stat().st_ino) in events[last:marker]
    assert events[marker + 1 :] == [("fsync", inode[disk.MARKER]), ("fsync", path.stat().st_ino)]
    assert ("fsync", tmp_path.stat().st_ino) in events[:marker]
