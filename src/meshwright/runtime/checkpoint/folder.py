"""Checkpoints on disk: one folder per step, whole only once its commit marker is there.

    step-00000100/
      __0_0.distcp …   data, one file per rank that writes any
      .metadata        which rectangle lies where
      extra.json       what is no tensor
      manifest.json    size and sha256 of every file above
      COMMITTED        sha256 of the manifest, written last

A save that dies at any moment leaves a folder without a marker that fits its manifest; it is not whole,
`survey` says why, and a later save of the same step replaces it. A folder that is to go is renamed first,
so that no half-deleted checkpoint bears the name of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from meshwright.errors import MeshwrightError, shown

MARKER = "COMMITTED"
MANIFEST = "manifest.json"
EXTRA = "extra.json"
METADATA = ".metadata"
_FORMAT = 1
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_REMOVING = ".removing"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """What a file held when it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """A step's folder, and why it is no whole checkpoint (None: it is)."""

    path: Path
    step: int
    problem: str | None


class HashedStream:
    """A file that is being written; every byte of a checkpoint goes through `write`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data and take it into the hash."""
        view = memoryview(data)
        self._file.write(view)
        self._sha256.update(view)
        self._size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def record(self) -> FileRecord:
        """Size and hash of what was written."""
        return FileRecord(self._size, self._sha256.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedStream]:
    """A new file that is on the disk, not merely in a buffer, when the block ends."""
    with open(path, "wb") as file:
        stream = HashedStream(file)
        yield stream
        file.flush()
        os.fsync(file.fileno())


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def prepare(folder: Path, step: int) -> Path:
    """A new, empty folder for a step. Refuses a whole checkpoint, replaces what is left of a broken one."""
    path = step_folder(folder, step)
    if os.path.lexists(path):
        if not path.is_dir() or path.is_symlink():
            raise MeshwrightError(f"{path}: not a folder, so no checkpoint can be saved there")
        if problem(path) is None:
            raise MeshwrightError(f"{path}: a whole checkpoint of step {step} is there already")
        discard(path)
    folder.mkdir(parents=True, exist_ok=True)
    for remains in folder.glob(f"step-*{_REMOVING}"):
        shutil.rmtree(remains, ignore_errors=True)
    path.mkdir()
    _sync_folder(folder)
    return path


def commit(path: Path, step: int, extra: str, files: Mapping[str, FileRecord]) -> None:
    """Make a folder whose data files are on the disk a whole checkpoint: the marker comes last."""
    files = {**files, EXTRA: _write(path / EXTRA, extra.encode("utf-8"))}
    listed = {name: asdict(files[name]) for name in sorted(files)}
    manifest = {"format": _FORMAT, "step": step, "files": listed}
    record = _write(path / MANIFEST, f"{json.dumps(manifest, indent=1)}\n".encode())
    _sync_folder(path)
    _write(path / MARKER, _marker(record.sha256))
    _sync_folder(path)


def _marker(manifest_sha256: str) -> bytes:
    return f"{manifest_sha256}\n".encode()


def _write(path: Path, data: bytes) -> FileRecord:
    with hashed_file(path) as stream:
        stream.write(data)
    return stream.record()


def _sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk; syncing a file alone may lose its name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Remove a step's folder; it stops being a checkpoint at once."""
    going = path.with_name(path.name + _REMOVING)
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    _sync_folder(path.parent)
    shutil.rmtree(going)


def retire(folder: Path, step: int, keep: int) -> None:
    """Remove whole checkpoints older than a step's, all but the newest `keep` with that step's counted."""
    older = [found.path for found in survey(folder) if found.problem is None and found.step < step]
    for path in older[: max(0, len(older) - (keep - 1))]:
        discard(path)


def survey(folder: Path) -> list[Found]:
    """Every step's folder, oldest step first, with what is wrong with it."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            name = _STEP_FOLDER.fullmatch(path.name)
            if name:
                found.append(Found(path, int(name[1]), problem(path)))
    return sorted(found, key=lambda one: one.step)


def problem(path: Path) -> str | None:
    """Why a folder is no whole checkpoint, by its marker, its manifest and the sizes of its files."""
    try:
        whole(path)
    except MeshwrightError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def whole(path: Path) -> dict[str, FileRecord]:
    """The files of a whole checkpoint with their records. Raises MeshwrightError that names what is not
    right; contents are not looked at."""
    if not path.is_dir():
        reason = "it is not a folder" if os.path.lexists(path) else "there is no such checkpoint"
        raise MeshwrightError(f"{path}: {reason}")
    marker = _read(path, MARKER, f"{MARKER} is missing: the save did not finish")
    manifest = _read(path, MANIFEST, f"{MANIFEST} is missing")
    if marker != _marker(hashlib.sha256(manifest).hexdigest()):
        raise MeshwrightError(f"{path}: {MANIFEST} is not the one that {MARKER} was written for")
    files = _listed_files(path, manifest)
    for name, record in files.items():
        size = regular_file(path, name).st_size
        if size != record.size:
            raise MeshwrightError(f"{path}: {name} has {size:,} bytes, {record.size:,} were written")
    return files


def regular_file(path: Path, name: str) -> os.stat_result:
    """The status of a file of a checkpoint; links lead outside it and are refused."""
    try:
        status = os.lstat(path / name)
    except OSError:
        raise MeshwrightError(f"{path}: {name} is missing") from None
    if not stat.S_ISREG(status.st_mode):
        raise MeshwrightError(f"{path}: {name} is not a plain file of the checkpoint")
    return status


def _read(path: Path, name: str, missing: str) -> bytes:
    if not os.path.lexists(path / name):
        raise MeshwrightError(f"{path}: {missing}")
    regular_file(path, name)
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise MeshwrightError(f"{path}: {name} cannot be read: {error.strerror}") from None


def _listed_files(path: Path, manifest: bytes) -> dict[str, FileRecord]:
    try:
        document = json.loads(manifest)
        if document["format"] != _FORMAT:
            raise MeshwrightError(
                f"{path}: {MANIFEST} has format {shown(document['format'])}, {_FORMAT} is read"
            )
        files = {name: FileRecord(**record) for name, record in document["files"].items()}
        fits = all(_is_record(record) for record in files.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise MeshwrightError(f"{path}: {MANIFEST} is not a manifest") from None
    for name in files:
        if not _PLAIN_NAME.fullmatch(name) or not name.strip("."):
            raise MeshwrightError(
                f"{path}: {MANIFEST} lists {shown(name)}, which is not a file of the checkpoint"
            )
    if not fits or not {EXTRA, METADATA} <= files.keys():
        raise MeshwrightError(f"{path}: {MANIFEST} is not a manifest")
    return files


def _is_record(record: FileRecord) -> bool:
    digest: Any = record.sha256
    return type(record.size) is int and isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None


def verified_bytes(path: Path, name: str, record: FileRecord) -> bytes:
    """The content of a small file of a checkpoint, once its hash is known to be right."""
    data = _read(path, name, f"{name} is missing")
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise MeshwrightError(_changed(path, name))
    return data


def verify_file(path: Path, name: str, record: FileRecord) -> None:
    """Raise MeshwrightError unless a file holds what was written."""
    regular_file(path, name)
    with open(path / name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != record.sha256:
        raise MeshwrightError(_changed(path, name))


def _changed(path: Path, name: str) -> str:
    return f"{path}: {name} has changed since it was written (its sha256 differs from the manifest's)"


def share(files: Mapping[str, FileRecord], rank: int, num_ranks: int) -> list[str]:
    """The files that a rank verifies: the largest first, each to the rank with the fewest bytes so far."""
    loads = [0] * num_ranks
    mine = []
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        lightest = loads.index(min(loads))
        loads[lightest] += files[name].size
        if lightest == rank:
            mine.append(name)
    return mine
