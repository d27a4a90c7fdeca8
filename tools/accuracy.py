"""Write docs/accuracy.md: predictions held against published runs, with every constant and its support.

--refit predicts every run by constants that were fitted without its recipe (a minute or two) and keeps the
predictions in benchmarks/accuracy; without it the page is written from what is kept. --check fails when the
page, or what is kept, is not what the code and the data give today.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from accuracy_page import FILES, Kept, pages
from meshwright.cost.constants import constants
from meshwright.planner.estimate import compose
from meshwright.planner.prices import prices
from meshwright.terminal.progress import progress_bar
from meshwright.validate.answer import (
    Priced,
    Validation,
    price,
    read_table,
    validated,
    with_simulation,
    worst_rows,
)
from meshwright.validate.predict import Prepared, predicted, step_times
from meshwright.validate.refit import Refit, refit
from meshwright.validate.rows import read_rows
from meshwright.validate.score import Prediction, group_score, score

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "accuracy"
RUNS, SINGLE_NODE = FOLDER / "training_runs.csv", FOLDER / "training_runs_single_node.csv"
ROWS, SCORES = FOLDER / "held_back.csv", FOLDER / "held_back.json"
CATALOG = ROOT / "src" / "meshwright" / "catalog"
APART = ("failures.yaml",)
"""Files of the catalogue that no prediction of a step reads."""
PROBED = 40
"""Every how many-th kept prediction is made again by --check, so that a change of the model shows."""


def digest() -> str:
    """First 16 hex digits of the SHA-256 over everything but code that predictions depend on."""
    yaml = [path for path in sorted(CATALOG.rglob("*.yaml")) if path.name not in APART]
    paths = [*yaml, *sorted(CATALOG.rglob("*.json")), RUNS, SINGLE_NODE]
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def keep() -> None:
    """Predict every run with its recipe held back, and keep predictions and scores."""
    with progress_bar() as progress:
        table = read_table(RUNS, progress)
        fitted = refit(table, constants(), progress, by_simulation=True)
        single = validated(read_table(SINGLE_NODE, progress))
        held = with_simulation(fitted.validation(), progress)
    shipped = validated(table)
    rows = list(_records(fitted, held, shipped))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    ROWS.write_text(text.getvalue(), "utf-8")
    scores = _scores(fitted, held, shipped) | _others(held, single)
    SCORES.write_text(json.dumps(_rounded(scores), indent=1, ensure_ascii=False) + "\n", "utf-8")


def _records(fitted: Refit, held: Validation, shipped: Validation) -> Iterator[dict[str, object]]:
    """What is kept of each run."""
    fold_of = {fitted.rows[k]: number for number, fold in enumerate(fitted.folds) for k in fold.rows}
    pairs = zip(held.scored, shipped.predictions, strict=True)
    for index, (scored, plain) in enumerate(pairs):
        run, prediction = scored.run, scored.prediction
        yield {
            "id": run.id,
            "group": run.group,
            "recipe": run.recipe,
            "fold": fold_of.get(index, ""),
            "source": run.source,
            "gpu": run.candidates[0].plan.cluster.gpu.name,
            "era": run.era,
            "measured_s": _short(run.measured_s),
            "held_back_s": _short(prediction.step_time_s),
            "low_s": _short(prediction.low_s),
            "high_s": _short(prediction.high_s),
            "shipped_s": _short(plain.step_time_s),
            "simulated_s": _short(prediction.simulated_s),
            "memory_bytes": prediction.memory_bytes if run.memory else "",
            "measured_memory_bytes": run.memory.bytes if run.memory else "",
        }


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


def _scores(fitted: Refit, held: Validation, shipped: Validation) -> dict[str, Any]:
    """What is kept of the fit and of its predictions together."""
    document = held.document
    return {
        "digest": digest(),
        **{name: document[name] for name in ("rows", "scored", "refused")},
        "recipes": len({one.run.recipe for one in fitted.timed}),
        "timed": len(fitted.rows),
        "folds": len(fitted.folds),
        "held_back": document["groups"],
        "shipped": shipped.document["groups"],
        "constants": {
            name: {"low": s.low, "high": s.high, "rows": s.rows, "error": s.error}
            for name, s in fitted.supports().items()
        },
        "worst": [_worst(held, shipped, s.run.id, error) for s, error in worst_rows(held.scored)],
    }


def _others(held: Validation, single: Validation) -> dict[str, Any]:
    """Scores of parts of the rows that cross groups, of rows apart, and of FLOPs alone."""
    table = held.table
    by_flops = score([one.run for one in table.priced], table.refusals, _by_flops(table.priced))
    moe = [s for s in held.scored if s.run.group != "dense"]
    without_efa = [s for s in moe if s.run.group != "moe_efa"]
    multi_node = [s for s in held.scored if s.run.recipe.startswith("vtrain/")]
    return {
        "flops": by_flops["groups"],
        "vtrain": group_score(multi_node),
        "moe": group_score(moe),
        "without_efa": group_score(without_efa),
        "single_node": single.document["groups"]["dense"]["time"],
    }


def _worst(held: Validation, shipped: Validation, name: str, error: float) -> dict[str, Any]:
    """One of the worst rows: what it is, and what its prediction is made of under the shipped constants."""
    (priced,) = (one for one in held.table.priced if one.run.id == name)
    row, prepared = priced.run.row, priced.prepared
    plan = prepared.measured[0].plan
    return {
        "id": name,
        "group": priced.run.group,
        "model": row.model,
        "gpus": f"{row.num_gpus} {row.gpu}",
        "layout": {axis: n for axis, n in plan.layout.degrees().items() if axis in _AXES and n > 1},
        "source": f"{row.source}, {row.source_path}",
        "measured_s": priced.run.measured_s,
        "error": error,
        "open": sorted({key for c in priced.run.candidates for key in c.assumed} - {"model"}),
        "parts": _parts(prepared),
    }


_AXES = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp")


def _parts(prepared: Prepared) -> dict[str, float]:
    """Shares of the predicted step, of the candidate nearest to the median."""
    times = step_times(prepared)[:, 0]
    middle = float(abs(times - median(times)).argmin())
    measured = prepared.measured[int(middle)]
    plan = measured.plan
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine, prepared.conditions)
    step = compose(measured, priced)
    shares = {name: seconds / step.total_s for name, seconds in step.parts.items()}
    return {name: share for name, share in sorted(shares.items(), key=lambda p: -p[1]) if share > 0.02}


def _by_flops(priced: Sequence[Priced]) -> list[Prediction]:
    """The baseline: model FLOPs over the peak, times one constant per GPU, number type and kind of model,
    each the one that errs least on the very rows that it is scored on."""
    ideal, ratios = [], defaultdict(list)
    for one in priced:
        plan = one.prepared.measured[0].plan
        precision = plan.workload.precision
        key = (plan.cluster.gpu.name, precision, plan.model.is_moe)
        peak = plan.cluster.num_gpus * plan.cluster.gpu.peak[precision]
        seconds = one.prepared.measured[0].model_flops / peak
        ideal.append((key, seconds))
        if one.run.measured_s:
            ratios[key].append(one.run.measured_s / seconds)
    factor = {key: _least_error(found) for key, found in ratios.items()}
    times = [seconds * factor.get(key, 2.0) for key, seconds in ideal]
    return [Prediction(one.run.id, t, t, t, None, "") for one, t in zip(priced, times, strict=True)]


def _least_error(ratios: Sequence[float]) -> float:
    """The k that makes Σ |k / r − 1| least: the median of r with weights 1 / r."""
    ordered, total = sorted(ratios), 0.0
    half = sum(1 / ratio for ratio in ordered) / 2
    for ratio in ordered:
        total += 1 / ratio
        if total >= half:
            break
    return ratio


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def kept() -> Kept:
    """What was kept, and the explanations of rows that people have looked at."""
    with ROWS.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return Kept(rows, json.loads(SCORES.read_text("utf-8")), FOLDER / "explanations.yaml")


def complaints() -> Iterator[str]:
    """What is stale."""
    if not ROWS.exists() or not SCORES.exists():
        yield "nothing is kept in benchmarks/accuracy"
        return
    known = kept()
    if known.scores["digest"] != digest():
        yield "the catalogue or the runs have changed since predictions were kept"
        return
    rows = {row.id: row for row in read_rows(RUNS)}
    for record in known.rows[::PROBED]:
        one = price(rows[record["id"]])
        seconds = (
            predicted(one.run, step_times(one.prepared), None).step_time_s if isinstance(one, Priced) else 0.0
        )
        if abs(seconds - float(record["shipped_s"])) > 1e-6 * seconds:
            yield f"{record['id']} is predicted {seconds:.6g} s now, and was {record['shipped_s']} s"
            return
    for path, text in zip(FILES, pages(known), strict=True):
        if not path.exists() or path.read_text("utf-8") != text:
            yield f"{path.relative_to(ROOT)} is not what is kept; run `make docs`"


def main() -> int:
    """Write the page, or with --check compare it. Exit status 1 when something is stale."""
    flags = sys.argv[1:]
    if "--check" in flags:
        found = list(complaints())
        for line in found:
            print(f"accuracy: {line}; `make accuracy` predicts anew", file=sys.stderr)
        return 1 if found else 0
    if "--refit" in flags:
        keep()
    for path, text in zip(FILES, pages(kept()), strict=True):
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
