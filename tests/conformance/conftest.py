"""The conformance suite runs the layouts on which training is tested, and the faults of dry runs."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "dryrun", HERE.parent / "runtime"):
    sys.path.insert(0, str(folder))
