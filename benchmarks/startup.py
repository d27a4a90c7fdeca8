"""How long commands take from start to end, as multiples of what Python alone takes.

Each round runs every command once, so that a busy machine slows all of them alike; the median of the rounds
counts. `python benchmarks/startup.py --rounds 9`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
BARE = "python -c pass"
COMMANDS = {
    BARE: ["-c", "pass"],
    "meshwright --help": ["-m", "meshwright", "--help"],
    "meshwright groups examples/brief-repaired.yaml": [
        *("-m", "meshwright", "groups", "examples/brief-repaired.yaml")
    ],
    "meshwright audit examples/brief.yaml": ["-m", "meshwright", "audit", "examples/brief.yaml"],
}


def wall_s(arguments: list[str]) -> float:
    """Seconds that one fresh interpreter takes. Raises CalledProcessError when it fails."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print the median of each command and its ratio to the bare interpreter."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command (7)")
    rounds = max(1, parser.parse_args().rounds)
    for arguments in COMMANDS.values():  # compile what is not compiled yet
        wall_s(arguments)
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            times[name].append(wall_s(arguments))
    bare_s = median(times[BARE])
    print(f"{'command':<48} {'median':>8} {'fastest':>8} {'x bare':>7}   ({rounds} rounds)")
    for name, taken in times.items():
        middle = median(taken)
        print(f"{name:<48} {1e3 * middle:6.0f} ms {1e3 * min(taken):5.0f} ms {middle / bare_s:7.1f}")


if __name__ == "__main__":
    main()
