"""The command line as benchmarks call it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def command(*arguments: str) -> Any:
    """What a command of meshwright prints as JSON."""
    called = [sys.executable, "-m", "meshwright", *arguments, "--json"]
    done = subprocess.run(called, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)
