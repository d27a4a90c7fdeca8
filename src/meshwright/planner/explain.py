"""Why a choice lost: which rule it breaks, by how much it does not fit, or which parts cost it time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshwright.errors import InputError
from meshwright.planner.answer import Answer, Progress, nothing_legal, plan_deployment, unwatched
from meshwright.planner.drafting import space_of
from meshwright.planner.ranked import Ranked
from meshwright.planner.scaling import fitting_nodes
from meshwright.planner.variants import fixed_keys, fixing, parse_choices

Verdict = str
"""`illegal`, `too large`, `slower`, or `best`."""


@dataclass(frozen=True)
class Explained:
    """What becomes of a choice.

    `plan` is the best plan that makes it, or where none fits the one that needs least memory, which lacks
    `missing_bytes`. `slower_s` is how much longer it takes than the best of all, also by part.
    """

    choices: Mapping[str, Any]
    verdict: Verdict
    why: str
    legal: int
    feasible: int
    plan: Ranked | None = None
    missing_bytes: int = 0
    slower_s: float = 0.0
    by_part_s: Mapping[str, float] | None = None

    def document(self) -> dict[str, Any]:
        """The explanation as JSON."""
        return {
            "choices": dict(self.choices),
            "verdict": self.verdict,
            "why": self.why,
            "legal": self.legal,
            "feasible": self.feasible,
            "missing_bytes": self.missing_bytes,
            "slower_s": self.slower_s,
            "by_part_s": dict(self.by_part_s or {}),
            "plan": None if self.plan is None else self.plan.document(),
        }


def explain(answer: Answer, text: str, progress: Progress = unwatched) -> Explained:
    """What becomes of a choice such as `tp=8,pp=4`, held against an answer. Raises InputError for a text that
    names no choice."""
    choices = parse_choices(text)
    deployment = fixing(answer.deployment, choices)
    space = space_of(deployment, answer.space.cluster)
    if not space.legal:
        error = nothing_legal(deployment, space)
        return Explained(choices, "illegal", str(error), 0, 0)
    own = plan_deployment(deployment, 1, progress)
    if own.best is None:
        return _too_large(choices, own)
    if answer.best is None:
        why = "it fits, while nothing does that keeps to the file"
        return Explained(choices, "best", why, own.found.legal, own.found.feasible, own.best)
    return _against(choices, own, own.best, answer.best)


def _too_large(choices: Mapping[str, Any], own: Answer) -> Explained:
    assert own.nearest is not None
    capacity = own.space.cluster.gpu.memory
    missing = own.nearest.peak_memory_bytes - capacity
    rank = max(own.nearest.memory, key=lambda rank: rank.total_bytes)
    lines = sorted(rank.lines, key=lambda line: -line.bytes)[:3]
    parts = ", ".join(f"{line.name} {line.bytes / 1e9:.1f} GB" for line in lines)
    why = (
        f"of {own.found.legal:,} legal candidates none fits: the smallest lacks {missing / 1e9:.1f} GB on "
        f"pipeline rank {rank.pp_rank} ({parts})"
    )
    return Explained(choices, "too large", why, own.found.legal, 0, own.nearest, missing)


def _against(choices: Mapping[str, Any], own: Answer, mine: Ranked, best: Ranked) -> Explained:
    slower = mine.step_time_s - best.step_time_s
    by_part = {part: seconds - best.parts[part] for part, seconds in mine.parts.items()}
    counts = (own.found.legal, own.found.feasible)
    if slower <= 1e-9 * best.step_time_s:
        why = "the best plan makes this choice" if not slower else "it is faster than what the file allows"
        return Explained(choices, "best", why, *counts, mine, 0, slower, by_part)
    costs = sorted(((s, part) for part, s in by_part.items() if s > 0), reverse=True)[:3]
    parts = ", ".join(f"{part} +{1e3 * s:.4g} ms" for s, part in costs)
    tie = " (a tie within the intervals)" if mine.interval_s[0] <= best.interval_s[1] else ""
    why = (
        f"{1e3 * slower:.4g} ms or {100 * slower / best.step_time_s:.3g} % slower than the best{tie}: {parts}"
    )
    return Explained(choices, "slower", why, *counts, mine, 0, slower, by_part)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change under which something fits, and how many candidates do."""

    change: str
    feasible: int


def remedies(answer: Answer, most_doublings: int = 6) -> list[Remedy]:
    """What would help where nothing fits: a fixed key left open, all of layout or policy, and more nodes."""
    fixed = [key for key in fixed_keys(answer.deployment) if key not in ("policy.engine", "layout.dp")]
    found = [remedy for key in fixed if (remedy := _opened(answer, [key], key))]
    for part in ("layout", "policy", ""):
        keys = [key for key in fixed if key.startswith(part)]
        if not found and len(keys) > 1:
            found += filter(None, [_opened(answer, keys, f"all of {part or 'layout and policy'}")])
    nodes = fitting_nodes(answer.deployment, most_doublings)
    if nodes is not None:
        found.append(Remedy(f"use {nodes[0]:,} GPUs", nodes[1]))
    return found


def _opened(answer: Answer, keys: list[str], words: str) -> Remedy | None:
    """Leaving keys open, if something fits then."""
    try:
        opened = plan_deployment(fixing(answer.deployment, dict.fromkeys(keys)), 1, at_least=0)
    except InputError:
        return None
    feasible = opened.found.feasible
    return Remedy(f"leave {words} open", feasible) if feasible else None
