"""The plots of docs/accuracy.md: well-formed, every point inside the frame, the same again."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

TITLES = {"dense": "dense", "moe_efa": "MoE <over> EFA"}


@pytest.fixture(scope="module")
def plots() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "tools" / "plots.py"
    spec = importlib.util.spec_from_file_location("plots", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def circles(svg: str, radius: str) -> list[tuple[float, float]]:
    """Centres of all circles of a radius, with the SVG read as XML."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found if c.attrib["r"] == radius]


def test_a_scatter_has_every_point_inside_its_frame(plots: ModuleType) -> None:
    points = {"dense": [(0.1, 0.11), (1.0, 2.0), (50.0, 40.0)], "moe_efa": [(3.0, 3.0)]}
    svg = plots.scatter(points, TITLES, "s", lambda value: f"{value:g}")
    assert svg == plots.scatter(points, TITLES, "s", lambda value: f"{value:g}")
    dots = circles(svg, "2.6")
    assert len(dots) == 4
    left, top, size = plots._LEFT, plots._TOP, plots._SIZE
    assert all(left < x < left + size and top < y < top + size for x, y in dots)
    on_diagonal = dots[-1]
    assert on_diagonal[0] - left == pytest.approx(top + size - on_diagonal[1], abs=0.11)
    above, below = dots[1], dots[2]
    assert above[0] - left < top + size - above[1], "predicted too long: above the diagonal"
    assert below[0] - left > top + size - below[1]
    assert "MoE &lt;over&gt; EFA (1)" in svg
    assert "dense (3)" in svg


def test_axes_have_ticks_however_narrow_the_range(plots: ModuleType) -> None:
    for points, ticks in (
        ([(30.0, 31.0), (90.0, 80.0)], {"50"}),
        ([(0.5, 0.5), (800.0, 900.0)], {"1", "100"}),
    ):
        svg = plots.scatter({"dense": points}, TITLES, "GB", lambda value: f"{value:g}")
        assert ticks <= set(re.findall(r">([\d.]+)</text>", svg))


def test_a_histogram_counts_what_lies_beyond_in_its_last_bars(plots: ModuleType) -> None:
    svg = plots.histograms({"dense": [-5.0, -0.59, 0.01, 0.02, 0.03, 7.0]}, TITLES)
    root = ElementTree.fromstring(svg)
    bars = [
        float(bar.attrib["height"])
        for group in root.iter("{http://www.w3.org/2000/svg}g")
        for bar in group.iter("{http://www.w3.org/2000/svg}rect")
    ]
    tallest = plots._PANEL_HEIGHT
    assert bars == pytest.approx([tallest * 2 / 3, tallest, tallest / 3], abs=0.1)
    assert ">3</text>" in svg
