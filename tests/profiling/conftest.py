"""Tests of this folder share modules that stand beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
sys.path.insert(0, str(Path(__file__).parent.parent / "calibrating"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text to train on."""
    path = tmp_path / "text.txt"
    path.write_text("Nature and nature's laws lay hid in night. " * 400, "utf-8")
    return path
