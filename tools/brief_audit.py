"""Write docs/brief-audit.md: every figure of examples/brief.yaml with its verdict, what can exist, and what a
search finds on the same machines.

Run with --check to fail when the page is not what the code and the examples give today.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import jinja2

from brief_steps import QUESTIONS, Steps, steps_of
from meshwright.audit import AuditReport, Checked, audit
from meshwright.deployment import read_deployment
from meshwright.planner.compare import Compared
from meshwright.planner.request import Request, answered
from meshwright.terminal.audit import said_once
from meshwright.terminal.compare import verdict
from meshwright.terminal.wording import interval, short_layout, short_policy
from meshwright.units import BYTES, SECONDS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "brief-audit.md"
WIDER = 14208
"""The expert FFN width of examples/brief-30b.yaml."""
LENGTHS = "128,1024,4096,10240"
SIGNS = {"holds": "✓ holds", "fails": "✗ fails", "undetermined": "? undetermined"}


def page() -> str:
    """The whole page, from the template beside this file."""
    brief = audit(read_deployment(ROOT / "examples" / "brief.yaml"))
    variant = audit(read_deployment(ROOT / "examples" / "brief-30b.yaml"))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["cell"] = _cell
    template = environment.get_template("brief_audit.md.j2")
    compared, wider = _compared("repaired"), _compared("30b", f"model.moe_intermediate_size={WIDER}")
    names = {line.name: line for rank in reversed(brief.memory) for line in reversed(rank.lines)}
    return template.render(
        brief=brief,
        whys=_whys(brief),
        variant=variant,
        counts=brief.counts(),
        lines=list(reversed(names.values())),
        peak=max(variant.memory, key=lambda rank: rank.total_bytes),
        signs=SIGNS,
        size=BYTES.format,
        words=_words,
        speed=_speed(brief),
        compared=compared,
        variant_compared=wider,
        simulated=_simulated(compared, wider),
        questions=QUESTIONS,
        seconds=SECONDS.format,
        interval=interval,
        faster=verdict,
        short_layout=short_layout,
        short_policy=short_policy,
    )


def _whys(report: AuditReport) -> list[str]:
    """The reason of each figure, without sentences that an earlier one has."""
    said: set[str] = set()
    return [said_once(checked.why, said) for checked in report.claims]


def _speed(report: AuditReport) -> list[Checked]:
    """The first statement of each figure that has a value by length."""
    found: dict[str, Checked] = {}
    for checked in report.claims:
        if checked.by_length:
            found.setdefault(checked.figure.id, checked)
    return list(found.values())


def _compared(against: str, *overrides: str) -> Compared:
    """The planned layout of examples/brief-plan.yaml against another file of the examples."""
    files = {name: str(ROOT / "examples" / f"brief-{name}.yaml") for name in ("plan", against)}
    asked = Request(file=files["plan"], against=files[against], lengths=LENGTHS, top=1, overrides=overrides)
    result = answered(asked)
    if result.compared is None:
        raise SystemExit("nothing fits for examples/brief-plan.yaml")
    return result.compared


def _simulated(compared: Compared, wider: Compared) -> list[tuple[str, list[Steps]]]:
    """The repaired and the planned layout, of the brief as it stands and of its 30 B variant."""
    lengths = [int(length) for length in LENGTHS.split(",")]
    found = []
    for title, pair in (("The dimensions as stated", compared), ("The 30 B variant", wider)):
        layouts = {"repaired": pair.against.plan, "planned": pair.planned.plan}
        found.append((title, [steps_of(name, plan, lengths) for name, plan in layouts.items()]))
    return found


def _cell(text: str) -> str:
    """Text as one table cell of Markdown."""
    return text.replace("|", "\\|").replace("*", "\\*")


def _words(degrees: Mapping[str, int]) -> str:
    return ", ".join(f"{axis.upper()} {degrees[axis]}" for axis in ("tp", "pp", "dp", "ep"))


def main() -> int:
    """Write the page, or with --check compare it. Exit status 1 when it is stale."""
    text = page() + "\n"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, "utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text("utf-8") != text:
        print(f"{PAGE.relative_to(ROOT)} is stale; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
