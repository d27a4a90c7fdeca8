"""Write docs/parity.md: how far every layout of the tests is from one process, and mistakes that are found.

The layouts, models and the comparison are those of `tests/runtime`. A run takes some minutes. With --check
nothing is trained: it fails when the page has other layouts than the tests, or errors beyond their limits.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "parity.md"
OPTIMIZERS = ("sgd", "adamw")
KINDS = ("loss", "gradient", "norm", "weight")

sys.path.insert(0, str(ROOT / "tests" / "runtime"))
layouts = import_module("layouts")


@dataclass(frozen=True)
class Row:
    """One layout as the page shows it: what it is, and its worst errors by optimizer and kind."""

    case: Any
    errors: dict[str, dict[str, float]]

    @property
    def cells(self) -> list[str]:
        """What the table holds."""
        return [*described(self.case), *(f"{self.errors[o][k]:.1e}" for o in OPTIMIZERS for k in KINDS)]


def described(case: Any) -> list[str]:
    """Ranks, layout, policy and model of a case."""
    plan = case.plan("sgd")
    degrees = [f"{axis.upper()} {degree}" for axis, degree in case.layout.items()]
    policy = [f"ZeRO {plan.policy.zero_stage}"]
    if plan.layout.pp > 1:
        policy += [plan.policy.schedule]
    if plan.layout.tp > 1:
        policy += ["SP" if plan.policy.sequence_parallel else "no SP"]
    if plan.model.is_moe and plan.layout.ep > 1:
        policy += [plan.policy.dispatcher]
    if plan.policy.recompute != "none":
        policy += [f"{plan.policy.recompute} recompute"]
    precision = [] if case.precision == "fp32" else [case.precision]
    return [str(case.world), " ".join(degrees), ", ".join(policy + precision), case.model]


def measured() -> dict[str, Any]:
    """Train every layout, and every mistake; what the template needs."""
    runs, mutations = import_module("parity_runs"), import_module("mutations").MUTATIONS
    with tempfile.TemporaryDirectory() as name:
        folder = import_module("training_runs").write_corpus(Path(name))
        rows = [measured_row(case, folder, runs) for case in (*layouts.CASES, *layouts.HALF)]
        found = [(one, runs.compared(one.case, "sgd", folder, one.steps, one.mutate)) for one in mutations]
        doubled = mutations[0]
        hidden = runs.compared(doubled.case, "adamw", folder, mutate=doubled.mutate)
    number = len(layouts.CASES)
    return {
        "rows": rows[:number],
        "half": rows[number:],
        "mutations": found,
        "hidden": hidden,
        "worst": {o: {k: max(r.errors[o][k] for r in rows[:number]) for k in KINDS} for o in OPTIMIZERS},
    }


def measured_row(case: Any, folder: Path, runs: Any) -> Row:
    """Train a case with both optimizers. Raises SystemExit where an error is beyond its limit."""
    errors = {}
    for optimizer in OPTIMIZERS:
        found = runs.compared(case, optimizer, folder)
        if wrong := found.beyond(layouts.limits(case, optimizer)):
            raise SystemExit(f"{case}, {optimizer}: {', '.join(wrong)}")
        errors[optimizer] = {kind: getattr(found, kind) for kind in KINDS}
    print(case, file=sys.stderr)
    return Row(case, errors)


def page() -> str:
    """The whole page, from the template beside this file."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)
    half = layouts.HALF[0]
    limits = {optimizer: layouts.limits(layouts.CASES[0], optimizer) for optimizer in OPTIMIZERS}
    template = environment.get_template("parity.md.j2")
    return template.render(
        measured(), kinds=KINDS, limits=limits, half_limits=layouts.limits(half, "sgd"), steps=layouts.STEPS
    )


def stale() -> Iterator[str]:
    """Why the page is not about the layouts of the tests."""
    if not PAGE.exists():
        yield "it is not there"
        return
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in _table_lines()]
    cases = (*layouts.CASES, *layouts.HALF)
    if [row[:4] for row in table] != [described(case) for case in cases]:
        yield "it lists other layouts than the tests"
        return
    for row, case in zip(table, cases, strict=True):
        limits = [layouts.limits(case, optimizer)[kind] for optimizer in OPTIMIZERS for kind in KINDS]
        if any(float(cell) > limit for cell, limit in zip(row[4:], limits, strict=True)):
            yield f"an error of {case} is beyond its limit"


def _table_lines() -> list[str]:
    return [line for line in PAGE.read_text("utf-8").splitlines() if re.match(r"\| \d+ \|", line)]


def main() -> int:
    """Write the page, or with --check look at it. Exit status 1 when it is stale."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page() + "\n", "utf-8")
        return 0
    reasons = list(stale())
    for reason in reasons:
        name = PAGE.relative_to(ROOT)
        print(f"{name} is stale: {reason}; run `python tools/parity.py`", file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    raise SystemExit(main())
