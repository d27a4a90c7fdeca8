"""Plans that pass every check, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwright.deployment import deployment_from
from meshwright.plan import Plan, resolve
from meshwright.verify import require_valid


def plan_of(document: dict[str, Any], text: Path) -> Plan:
    """A checked plan that reads the given text."""
    plan = resolve(deployment_from({**document, "training": {"data": str(text)}}, Path()))
    require_valid(plan)
    return plan
