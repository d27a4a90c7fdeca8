"""Save on one layout of ranks, load on any other.

Every function here is collective: all ranks of the process group call it, and all of them return, or all
raise the same MeshwrightError. Without torch.distributed one process is enough.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from meshwright.errors import MeshwrightError, shown
from meshwright.runtime.checkpoint import folder as disk
from meshwright.runtime.checkpoint.folder import EXTRA, METADATA, FileRecord
from meshwright.runtime.checkpoint.metadata import parse_metadata, saved_tensors
from meshwright.runtime.checkpoint.pieces import Pieces
from meshwright.runtime.checkpoint.planning import (
    PiecesLoadPlanner,
    PiecesSavePlanner,
    check_pieces,
    check_saved,
    check_wanted,
)
from meshwright.runtime.checkpoint.ranks import Ranks, contact, message_of
from meshwright.runtime.checkpoint.storage import PiecesReader, PiecesWriter

_SHOWN_NAMES = 3
_logger = logging.getLogger(__name__)


def save(
    folder: str | Path,
    step: int,
    state: Mapping[str, Pieces],
    extra: Mapping[str, Any],
    keep: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of a step and return its folder; it counts only once it is complete.

    Each rank gives what it holds; together they must hold every element of every tensor, and parts of two
    ranks are equal or disjoint. A rank may hold nothing of a tensor, or not name it. `extra` is JSON and
    taken from the first rank. `keep` leaves that many whole checkpoints, this one counted, and removes
    older ones. Raises MeshwrightError; a checkpoint of this step that is whole is never written over.
    """
    ranks = Ranks(process_group)
    folder = Path(folder)
    doing = f"saving step {step} to {folder}"

    def check() -> tuple[int, str | None]:
        _check_arguments(step, keep)
        for name, pieces in state.items():
            check_pieces(name, pieces)
        return step, _as_json(extra) if ranks.is_first else None

    def prepare(asked: list[tuple[int, str | None]]) -> tuple[Path, str]:
        _same("step", [step for step, _ in asked])
        return disk.prepare(folder, step), asked[0][1] or ""

    path, text = ranks.concluded(doing, check, prepare)
    try:
        written = _write(doing, path, state, ranks)
        ranks.concluded(
            doing, lambda: written, lambda records: disk.commit(path, step, text, _merged(records))
        )
    except MeshwrightError:
        if ranks.is_first:
            _clear(path)
        raise
    if keep is not None:
        ranks.first_does(doing, lambda: _retire(folder, step, keep))
    return path


def load(
    path: str | Path,
    state: Mapping[str, Pieces],
    *,
    strict: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill the pieces in place from a checkpoint and return its `extra`.

    Every file is verified before any is used. Names, shapes and dtypes must be those of the checkpoint;
    `strict` refuses tensors of the checkpoint that no rank names. Raises MeshwrightError; only when reading
    itself fails may some pieces have been filled.
    """
    ranks = Ranks(process_group)
    path = Path(path)
    doing = f"loading {path}"

    def opened(names: list[str]) -> dict[str, FileRecord]:
        _same("checkpoint", names)
        return disk.whole(path)

    files = ranks.concluded(doing, lambda: path.name, opened)
    ranks.together(doing, lambda: _verify_share(path, files, ranks))
    metadata, extra = ranks.together(doing, lambda: _described(path, files))
    saved = saved_tensors(metadata)

    def compare() -> set[str]:
        check_saved(saved, ranks.rank, ranks.size)
        check_wanted(state, saved)
        return set(state)

    def left_over(wanted: list[set[str]]) -> None:
        if strict:
            _refuse_left_over(path, sorted(saved.keys() - set().union(*wanted)))

    ranks.concluded(doing, compare, left_over)
    _read(doing, path, metadata, state, ranks)
    return extra


def described(path: str | Path, process_group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """The `extra` of a checkpoint alone, verified: what it was saved with is known before anything is filled.
    Raises MeshwrightError."""
    path = Path(path)

    def read() -> dict[str, Any]:
        return _described(path, disk.whole(path))[1]

    return Ranks(process_group).together(f"reading {path}", read)


def newest(folder: str | Path, process_group: dist.ProcessGroup | None = None) -> Path | None:
    """The whole checkpoint of the highest step, or None. Broken ones are passed over, and logged with what
    is wrong with them; `survey` lists all. Contents are verified by `load`."""
    ranks = Ranks(process_group)

    def look() -> Path | None:
        for found in reversed(disk.survey(Path(folder))):
            if found.problem is None:
                return found.path
            _logger.warning("%s is passed over: %s", found.path, found.problem)
        return None

    return ranks.first_does(f"looking for checkpoints in {folder}", look)


def _write(doing: str, path: Path, state: Mapping[str, Pieces], ranks: Ranks) -> dict[str, FileRecord]:
    """Let DCP plan and write; the files that this rank wrote."""
    writer = PiecesWriter(path)
    _in_dcp(
        doing,
        lambda: dcp_save(
            dict(state),
            storage_writer=writer,
            planner=PiecesSavePlanner(),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        ),
    )
    return writer.records


def _read(doing: str, path: Path, metadata: Metadata, state: Mapping[str, Pieces], ranks: Ranks) -> None:
    """Let DCP plan and read what metadata that was verified describes."""
    _in_dcp(
        doing,
        lambda: dcp_load(
            dict(state),
            storage_reader=PiecesReader(path, metadata),
            planner=PiecesLoadPlanner(),
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        ),
    )


def _check_arguments(step: int, keep: int | None) -> None:
    if type(step) is not int or step < 0:
        raise MeshwrightError(f"step: {shown(step)}: a step is a whole number from 0")
    if keep is not None and (type(keep) is not int or keep < 1):
        raise MeshwrightError(f"keep: {shown(keep)}: at least one checkpoint is kept")


def _as_json(extra: Mapping[str, Any]) -> str:
    """JSON text that reads back equal: no keys but text, no tuples, no NaN."""
    try:
        text = json.dumps(dict(extra), allow_nan=False, indent=1) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise MeshwrightError(f"extra: {error}: only what JSON can hold is saved") from None
    if json.loads(text) != dict(extra):
        raise MeshwrightError("extra: JSON would not give it back equal; use text as keys and no tuples")
    return text


def _same(what: str, values: list[Any]) -> None:
    if len(set(values)) > 1:
        different = ", ".join(shown(value) for value in sorted(set(values))[:_SHOWN_NAMES])
        raise MeshwrightError(f"{what}: the ranks do not agree on it: {different}")


def _merged(records: list[dict[str, FileRecord]]) -> dict[str, FileRecord]:
    return {name: record for one in records for name, record in one.items()}


def _clear(path: Path) -> None:
    """Take away what a failed save has written, so that a full disk does not stay full."""
    if path.is_dir() and disk.problem(path) is not None:
        try:
            disk.discard(path)
        except OSError as error:
            _logger.warning("%s is not whole and cannot be removed: %s", path, error.strerror)


def _retire(folder: Path, step: int, keep: int) -> None:
    """A checkpoint that is committed is not lost because an old one cannot be removed."""
    try:
        disk.retire(folder, step, keep)
    except OSError as error:
        _logger.warning("%s cannot be removed: %s", error.filename, error.strerror)


def _verify_share(path: Path, files: Mapping[str, FileRecord], ranks: Ranks) -> None:
    for name in disk.share(files, ranks.rank, ranks.size):
        disk.verify_file(path, name, files[name])


def _described(path: Path, files: Mapping[str, FileRecord]) -> tuple[Metadata, dict[str, Any]]:
    """What the checkpoint says of itself; hashed again by each rank, on the very bytes that are parsed."""
    try:
        metadata = parse_metadata(disk.verified_bytes(path, METADATA, files[METADATA]), files)
        extra = json.loads(disk.verified_bytes(path, EXTRA, files[EXTRA]))
    except (ValueError, RecursionError):
        raise MeshwrightError(f"{path}: {EXTRA} is not JSON") from None
    except MeshwrightError as error:
        raise MeshwrightError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return metadata, extra


def _refuse_left_over(path: Path, names: list[str]) -> None:
    if names:
        more = "" if len(names) <= _SHOWN_NAMES else f" and {len(names) - _SHOWN_NAMES} more"
        raise MeshwrightError(
            f"{path}: nothing wants its {', '.join(names[:_SHOWN_NAMES])}{more}; not strict, they are ignored"
        )


def _in_dcp(doing: str, call: Callable[[], object]) -> None:
    """Call DCP; what it reports of any rank becomes the message of the lowest rank that failed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            contact(doing, call)
        except CheckpointException as error:
            cause = error.failures[min(error.failures)][0]
            if not isinstance(cause, Exception):  # an interrupt stays one
                raise cause from None
            raise MeshwrightError(message_of(doing, cause)) from cause
