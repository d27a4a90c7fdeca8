"""The three pictures of a timeline, read back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.simulator.plans import example, plan

from meshwright.errors import InputError
from meshwright.simulator.simulate import simulate
from meshwright.timeline import Event, Timeline


def event(rank: int, action: str, start: float, end: float, stream: str = "compute") -> Event:
    return Event(rank, stream, action, f"{action} <op>", rank, 0, "", start, end)


BY_HAND = Timeline(
    (
        event(0, "F", 0, 2),
        event(0, "F", 0.5, 1.5, "ep, beside"),
        event(0, "F", 2, 3),
        event(1, "F", 3, 6),
        event(1, "B", 6, 9),
        Event(1, "dp", "step", "reduce", -1, -1, "dp", 9, 10),
    ),
    {0: "first", 1: "second"},
    10.0,
    frozenset({"ep, beside"}),
)


def test_text_shows_what_takes_most_of_each_column() -> None:
    assert BY_HAND.text(12) == "0 FFF.......\n1 ...FFFBBB="
    assert all(len(line) <= 7 for line in BY_HAND.text(7).splitlines())


def test_blocks_are_runs_of_one_action() -> None:
    spans = [(block.rank, block.action, block.start_s, block.end_s) for block in BY_HAND.blocks()]
    assert spans == [(0, "F", 0, 3), (1, "F", 3, 6), (1, "B", 6, 9), (1, "step", 9, 10)]


def test_a_trace_names_ranks_and_streams_and_keeps_every_event(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    timeline = simulate(plan({"pp": 2, "ep": 8}, workload={"global_batch_size": 32})).timeline()
    timeline.to_chrome_trace(path)
    entries = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {entry["pid"]: entry["args"]["name"] for entry in entries if entry["name"] == "process_name"}
    assert names == timeline.ranks
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in entries if e["name"] == "thread_name"}
    spans = [entry for entry in entries if entry["ph"] == "X"]
    assert len(spans) == len(timeline.events)
    for entry, mine in zip(spans, timeline.events, strict=True):
        assert threads[entry["pid"], entry["tid"]] == mine.stream
        assert entry["ts"] == pytest.approx(1e6 * mine.start_s, abs=1e-3)
        assert entry["dur"] == pytest.approx(1e6 * (mine.end_s - mine.start_s), abs=1e-3)


def test_the_trace_of_the_largest_example_is_small(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    simulate(example("deepseek-v3-2048")).timeline().to_chrome_trace(path)
    assert path.stat().st_size < 5e6


def test_the_same_step_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        simulate(plan({"pp": 2, "ep": 8})).timeline().to_chrome_trace(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_gantt_has_a_bar_for_each_block(tmp_path: Path) -> None:
    path = tmp_path / "gantt.svg"
    BY_HAND.to_svg(path, width=1130)
    root = ElementTree.parse(path).getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    bars = [bar for bar in root.findall("svg:rect", space) if bar.find("svg:title", space) is not None]
    assert [(float(bar.get("x", 0)), float(bar.get("width", 0))) for bar in bars] == [
        (120.0, 300.0),
        (420.0, 300.0),
        (720.0, 300.0),
        (1020.0, 100.0),
    ]


def test_a_path_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        BY_HAND.to_chrome_trace(tmp_path / "none" / "trace.json.gz")
