"""Where documents come from: what `training.data` names, with a digest of its content."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from meshwright.errors import InputError
from meshwright.runtime.data import formats
from meshwright.runtime.data.formats import KEY, Documents

READERS: dict[str, Callable[[Path], Documents]] = {
    ".txt": formats.text_documents,
    ".jsonl": formats.json_lines_documents,
    ".parquet": formats.parquet_documents,
}
"""What a folder's files are read with. A file that is named itself is text whatever else it ends in."""


@dataclass(frozen=True)
class Source:
    """A corpus before it is tokens. `documents` yields text with the bytes read so far, of `num_bytes`.

    `digest` is of the content: two sources with the same documents by the same format have the same.
    """

    name: str
    digest: str
    num_bytes: int
    documents: Callable[[], Documents]


def open_source(data: str | None, folder: Path) -> Source:
    """The source that `training.data` names: a path from `folder`, or None for Python's help texts.

    Raises InputError when there is nothing that can be read there.
    """
    if data is None:
        return _python_source()
    path = folder / data
    try:
        if path.is_file():
            return _file_source(path, [path])
        if path.is_dir():
            return _folder_source(path)
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise InputError(KEY, data, f"cannot be read: {_reason(error)}") from None
    if exists:  # opening a pipe could wait for ever
        raise InputError(KEY, str(path), "a pipe or device; a file or a folder is needed")
    raise InputError(KEY, data, f"no such file or folder in {folder}", _names_like(path))


def _python_source() -> Source:
    topics = formats.python_topics()
    digest = hashlib.sha256()
    for text in topics:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    num_bytes = sum(len(text.encode("utf-8")) for text in topics)

    def documents() -> Documents:
        done = 0
        for text in topics:
            done += len(text.encode("utf-8"))
            yield text, done

    return Source("Python's help texts", digest.hexdigest(), num_bytes, documents)


def _folder_source(folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file():
        folder = folder / _split(folder)
    if (folder / "state.json").is_file():
        return _dataset_source(folder)
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in READERS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        rule = f"the folder holds neither a saved dataset nor files that end in {', '.join(READERS)}"
        raise InputError(KEY, str(folder), rule)
    return _file_source(folder, files)


def _split(folder: Path) -> str:
    """The split of a saved DatasetDict to train on: `train`, or the only one."""
    path = folder / "dataset_dict.json"
    try:
        splits = json.loads(path.read_text("utf-8"))["splits"]
        names = [str(name) for name in splits if (folder / str(name)).is_dir()]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(KEY, str(path), f"not a saved dataset: {_reason(error)}") from None
    if "train" in names or len(names) == 1:
        return "train" if "train" in names else names[0]
    rule = "a dataset of several splits, none of them `train`: name one split's folder"
    raise InputError(KEY, str(folder), rule, [str(folder / name) for name in names[:4]])


def _dataset_source(folder: Path) -> Source:
    files = formats.dataset_files(folder)
    num_bytes = sum(path.stat().st_size for path in files)

    def documents() -> Documents:
        with _reading(folder):
            yield from formats.dataset_documents(folder)

    return Source(str(folder), _digest(files, "dataset"), num_bytes, documents)


def _file_source(path: Path, files: Sequence[Path]) -> Source:
    def documents() -> Documents:
        before = 0
        for file in files:
            with _reading(file):
                for text, done in _reader(file)(file):
                    yield text, before + done
                before += file.stat().st_size

    num_bytes = sum(file.stat().st_size for file in files)
    return Source(str(path), _digest(files), num_bytes, documents)


def _reader(path: Path) -> Callable[[Path], Documents]:
    return READERS.get(path.suffix, formats.text_documents)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is read into a message that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(KEY, str(path), f"cannot be read: {_reason(error)}") from None


def _digest(files: Sequence[Path], kind: str | None = None) -> str:
    """Of what the files hold and how they are read, not of their names: moving a corpus changes nothing."""
    digest = hashlib.sha256()
    for path in files:
        with _reading(path), open(path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        read_as = kind or (path.suffix if path.suffix in READERS else ".txt")
        digest.update(f"{read_as} {content}\n".encode())
    return digest.hexdigest()


def _names_like(path: Path) -> list[str]:
    try:
        names = [found.name for found in path.parent.iterdir()]
    except (OSError, ValueError):
        return []
    return difflib.get_close_matches(path.name, names, n=3)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
