"""Traces by hand: events as torch's profiler writes them, times in µs."""

from __future__ import annotations

from typing import Any

HOST = 7


def event(name: str, start: float, end: float, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    """One complete event."""
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, "tid": HOST, "args": args}


def note(name: str, start: float, end: float) -> dict[str, Any]:
    """One label."""
    return event(name, start, end, "user_annotation")


def call(axis: str, kind: str, size: int, start: float, end: float) -> dict[str, Any]:
    """One labelled collective."""
    return note(f"collective:{axis} {kind} {size}", start, end)
