"""Documents out of files: text, JSON lines, Parquet, a saved dataset, and what Python brings along.

Each reader yields a document's text with the bytes of its file that were read so far. Files are read as they
are needed, never whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from meshwright.errors import InputError, shown

KEY = "training.data"
FIELD = "text"
"""The field of a JSON line, and the column of a table, that holds a document."""

Documents = Iterator[tuple[str, int]]

_ROWS_AT_ONCE = 1024


def text_documents(path: Path) -> Documents:
    """Documents of a UTF-8 text file: what stands between blank lines (empty, or of white space only)."""
    lines: list[bytes] = []
    first, done = 1, 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            done += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                first = first if lines else number
                lines.append(line)
            elif lines:
                yield _decoded(path, lines, first), done
                lines = []
    if lines:
        yield _decoded(path, lines, first), done


def _decoded(path: Path, lines: list[bytes], first: int) -> str:
    data = b"".join(lines)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first + data.count(b"\n", 0, error.start)
        rule = f"line {line}: 0x{data[error.start]:02x} is not UTF-8 text"
        raise InputError(KEY, str(path), rule) from None
    return text.replace("\r\n", "\n").rstrip("\n")


def json_lines_documents(path: Path) -> Documents:
    """Documents of a JSON lines file: the field `text` of each line. Blank lines are passed over."""
    done = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            done += len(line)
            if line.strip():
                yield _text_of_line(path, line, number), done


def _text_of_line(path: Path, line: bytes, number: int) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        # An error's own words may quote the input, or repeat that it is line 1 of this one line.
        what = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise InputError(KEY, str(path), f"line {number}: not JSON: {what}") from None
    if not isinstance(record, dict):
        rule = f"line {number}: {shown(record)} is no mapping with the field `{FIELD}`"
        raise InputError(KEY, str(path), rule, ['{"text": "…"}'])
    text = _text_of(path, record, f"line {number}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(KEY, str(path), f"line {number}: half a character (a lone surrogate)") from None
    return text


def _text_of(path: Path, record: Mapping[str, Any], where: str) -> str:
    if FIELD not in record:
        near = [shown(name) for name, value in record.items() if isinstance(value, str)][:4]
        raise InputError(KEY, str(path), f"{where}: no field `{FIELD}` among {shown(list(record))}", near)
    text = record[FIELD]
    if not isinstance(text, str):
        raise InputError(KEY, str(path), f"{where}: the field `{FIELD}` is {shown(text)}, not text")
    return text


def parquet_documents(path: Path) -> Documents:
    """Documents of a Parquet file: the rows of its column `text`."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as table:
            _check_columns(path, table.schema_arrow.names)
            batches = table.iter_batches(_ROWS_AT_ONCE, columns=[FIELD])
            columns = (batch.column(0).to_pylist() for batch in batches)
            yield from _rows(path, columns, table.metadata.num_rows, size)
    except pa.ArrowException as error:
        raise InputError(KEY, str(path), f"not a Parquet file: {_first_line(error)}") from None


def dataset_documents(folder: Path) -> Documents:
    """Documents of a Hugging Face dataset that `save_to_disk` wrote: the rows of its column `text`."""
    import datasets  # type: ignore[import-untyped]  # slow to load, and seldom needed

    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(KEY, str(folder), f"not a saved dataset: {_first_line(error)}") from None
    _check_columns(folder, dataset.column_names)
    tables = dataset.select_columns([FIELD]).with_format("arrow").iter(_ROWS_AT_ONCE)
    size = sum(path.stat().st_size for path in dataset_files(folder))
    yield from _rows(folder, (table.column(0).to_pylist() for table in tables), len(dataset), size)


def dataset_files(folder: Path) -> list[Path]:
    """The files that hold a saved dataset's rows, in their order; not what its later use left there."""
    return sorted(path for path in folder.glob("*.arrow") if not path.name.startswith("cache-"))


def _check_columns(path: Path, names: list[str]) -> None:
    if FIELD not in names:
        rule = f"no column `{FIELD}` among {shown(names)}"
        raise InputError(KEY, str(path), rule, [shown(name) for name in names[:4]])


def _rows(path: Path, columns: Iterable[list[Any]], num_rows: int, size: int) -> Documents:
    """Documents of a table; its rows stand for equal shares of its bytes."""
    number = 0
    for column in columns:
        for text in column:
            number += 1
            if not isinstance(text, str):
                rule = f"row {number}: the column `{FIELD}` holds {shown(text)}, not text"
                raise InputError(KEY, str(path), rule)
            yield text, size * number // num_rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def python_topics() -> list[str]:
    """The topics of Python's own `help()`: some 80 articles of English prose with code, half a megabyte."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        rule = "this Python came without its help texts (pydoc_data); name a file of text"
        raise InputError(KEY, None, rule, ["corpus.txt"]) from None
    return [topics[name] for name in sorted(topics)]
