"""A CSV of measured runs, one typed row a line; a blank cell is None and means that nothing is known."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from meshwright.errors import InputError
from meshwright.files import read_text

MAX_BYTES = 20_000_000
_LONGEST_CELL = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run as its source states it. Times are seconds; `memory` is in the unit that
    `memory_definition` names; `None` is what the source leaves out."""

    id: str
    source: str
    source_path: str
    year: int | None
    task: str
    # model
    model: str
    num_layers: int | None
    hidden_size: int | None
    feed_forward_size: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None
    num_experts: int | None
    experts_per_token: int | None
    expert_feed_forward_size: int | None
    num_first_dense_layers: int | None
    num_shared_experts: int | None
    shared_feed_forward_size: int | None
    sequence_length: int | None
    gated: bool | None
    attention: str
    # cluster
    gpu: str
    num_gpus: int | None
    gpus_per_node: int | None
    interconnect: str
    precision: str
    # layout
    tp: int | None
    sequence_parallel: bool | None
    pp: int | None
    vpp: int | None
    cp: int | None
    ep: int | None
    etp: int | None
    dp: int | None
    # policy
    global_batch_size: int | None
    micro_batch_size: int | None
    recompute: str
    zero: str
    dispatcher_overlap: str
    routing: str
    framework: str
    # what was measured
    tokens_per_s_per_gpu: float | None
    tflops_per_gpu: float | None
    tflops_definition: str
    mfu_percent: float | None
    iteration_time_s: float | None
    iteration_time_derived_s: float | None
    memory: float | None
    memory_definition: str
    quality: str
    latest_in_group: str
    notes: str


_COLUMN: dict[str, str] = {  # of fields that do not carry their column's name
    "num_layers": "layers",
    "hidden_size": "hidden",
    "feed_forward_size": "ffn",
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "vocab_size": "vocab",
    "num_experts": "experts",
    "experts_per_token": "topk",
    "expert_feed_forward_size": "moe_ffn",
    "num_first_dense_layers": "first_dense_layers",
    "num_shared_experts": "shared_experts",
    "shared_feed_forward_size": "shared_ffn",
    "sequence_length": "seq_len",
    "attention": "attn_type",
    "num_gpus": "n_gpus",
    "tp": "TP",
    "sequence_parallel": "SP",
    "pp": "PP",
    "vpp": "VPP",
    "cp": "CP",
    "ep": "EP",
    "etp": "ETP",
    "dp": "DP",
    "global_batch_size": "gbs",
    "micro_batch_size": "mbs",
    "tflops_per_gpu": "TFLOPs_per_gpu",
    "tflops_definition": "tflops_def",
    "mfu_percent": "MFU",
    "memory": "peak_mem_GB",
    "memory_definition": "mem_def",
}


def columns() -> tuple[str, ...]:
    """Every column that is read, in the order of Row's fields."""
    return tuple(_COLUMN.get(field.name, field.name) for field in fields(Row))


def read_rows(path: str | Path) -> list[Row]:
    """Every row of a file. Raises InputError when it is no table of runs, or a cell is not what it
    should be."""
    text = read_text(path, MAX_BYTES)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        missing = [name for name in columns() if name not in (reader.fieldnames or ())]
        if missing:
            rule = f"a table of runs has these columns, and this one lacks {', '.join(missing)}"
            raise InputError(str(path), f"{len(missing)} columns missing", rule)
        rows = [_row(record, f"{path}, line {reader.line_num}") for record in reader]
    except csv.Error as error:
        raise InputError(str(path), str(error), "the file is no comma-separated table") from None
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(str(path), row.id, "an id names one row")
        seen.add(row.id)
    return rows


def _row(record: Mapping[str | None, Any], where: str) -> Row:
    values: dict[str, Any] = {}
    for field in fields(Row):
        name = _COLUMN.get(field.name, field.name)
        cell = record.get(name)
        read = _READERS[str(field.type)]
        try:
            values[field.name] = read((cell or "").strip())
        except ValueError:
            rule = f"a {_KINDS[str(field.type)]}, or nothing where it is not known"
            raise InputError(f"{where}, column {name}", cell, rule) from None
    if not values["id"]:
        raise InputError(f"{where}, column id", "", "every row has an id")
    return Row(**values)


def _whole(cell: str) -> int | None:
    if not cell:
        return None
    number = float(cell)
    if not 0 <= number < 2**53 or number != int(number):
        raise ValueError(cell)
    return int(number)


_SMALLEST, _LARGEST = 1e-6, 1e15
"""What a measured time, rate or number of gigabytes may be: nothing that ran measures 0."""


def _real(cell: str) -> float | None:
    if not cell:
        return None
    number = float(cell)
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError(cell)
    return number


def _yes(cell: str) -> bool | None:
    match cell.lower():
        case "":
            return None
        case "y" | "yes" | "true" | "1":
            return True
        case "n" | "no" | "false" | "0":
            return False
    raise ValueError(cell)


_READERS: dict[str, Callable[[str], object]] = {
    "str": str,
    "int | None": _whole,
    "float | None": _real,
    "bool | None": _yes,
}
_KINDS = {
    "str": "text",
    "int | None": "whole number",
    "float | None": "positive number",
    "bool | None": "y or n",
}
