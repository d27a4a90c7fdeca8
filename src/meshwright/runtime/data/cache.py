"""Tokens on disk: made once, memory-mapped afterwards.

A corpus is three files beside one another: `KEY.tokens.npy` and `KEY.offsets.npy`, and `KEY.json`, which
says what the two must hold. The key stands for the content, so whoever writes a file of that name writes the
same bytes: processes that start together may all write, each to a file of its own that then takes the name
at once. What a crash or a bad disk leaves does not match `KEY.json` and is made anew.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from meshwright.runtime.data.tokenizer import TokenArray

Chunks = Iterable[tuple[TokenArray, NDArray[np.int64]]]
"""Tokens of some documents one after another, and how many each has."""

Arrays = tuple[TokenArray, NDArray[np.int64]]
"""All tokens [T], and where each document starts among them, with T at the end [D + 1]."""

_PARTS = ("tokens", "offsets")
_READ_BYTES = 2**22


def default_folder() -> Path | None:
    """Where a user's caches lie: `$XDG_CACHE_HOME` or `~/.cache`; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "meshwright" / "data"


def load(folder: Path, key: str) -> Arrays | None:
    """The arrays stored under a key, memory-mapped; None when there are none, or not as they were written."""
    try:
        checksums = json.loads((folder / f"{key}.json").read_text("utf-8"))["crc32"]
        for part in _PARTS:
            if _crc32(folder / f"{key}.{part}.npy") != checksums[part]:
                return None
        tokens, offsets = (
            np.load(folder / f"{key}.{part}.npy", mmap_mode="r", allow_pickle=False) for part in _PARTS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return np.asarray(tokens), np.asarray(offsets)


def store(folder: Path, key: str, chunks: Chunks) -> None:
    """Write a corpus under a key. Raises OSError where the folder cannot be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths: list[NDArray[np.int64]] = []
    checksums = {}
    with _replacing(folder / f"{key}.tokens.npy") as temporary:
        with open(temporary, "wb") as stream:
            _write_tokens(stream, chunks, lengths)
        checksums["tokens"] = _crc32(temporary)
    with _replacing(folder / f"{key}.offsets.npy") as temporary:
        with open(temporary, "wb") as stream:
            np.save(stream, offsets_of(lengths), allow_pickle=False)
        checksums["offsets"] = _crc32(temporary)
    with _replacing(folder / f"{key}.json") as temporary:
        temporary.write_text(json.dumps({"crc32": checksums}), "utf-8")


def _write_tokens(stream: BinaryIO, chunks: Chunks, lengths: list[NDArray[np.int64]]) -> None:
    """Tokens as they come, in one npy file; how many there are is known, and written, at the end."""
    num_tokens = 0
    dtype: np.dtype[np.uint16 | np.uint32] = np.dtype(np.uint16)

    def write_header() -> None:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (num_tokens,)}
        np.lib.format.write_array_header_1_0(stream, header)

    write_header()
    room = stream.tell()
    for tokens, counts in chunks:
        stream.write(tokens.tobytes())
        lengths.append(counts)
        num_tokens, dtype = num_tokens + len(tokens), tokens.dtype
    stream.seek(0)
    write_header()
    # numpy leaves room in a header for the first dim to grow (format.GROWTH_AXIS_MAX_DIGITS).
    assert stream.tell() == room


def offsets_of(lengths: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Where documents of these lengths start one after another, with the end of the last [D + 1]."""
    zero = np.zeros(1, np.int64)
    return np.cumsum(np.concatenate([zero, *lengths]), dtype=np.int64)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new file that takes the name of `target` once it is whole; nothing is left when it never is."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:  # an interrupt too
        temporary.unlink(missing_ok=True)
        raise


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as stream:
        while data := stream.read(_READ_BYTES):
            checksum = zlib.crc32(data, checksum)
    return checksum
