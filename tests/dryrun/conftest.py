"""Tests of this folder use the layouts on which training is tested, and the ranks of its runs."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "runtime"):
    sys.path.insert(0, str(folder))
