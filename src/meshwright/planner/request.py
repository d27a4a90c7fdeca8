"""What somebody asked of a search, and all that was answered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from meshwright.deployment import Deployment
from meshwright.errors import InputError
from meshwright.plan import open_placement, write_plan
from meshwright.planner.answer import TOP, Answer, Progress, plan_deployment, unwatched
from meshwright.planner.compare import Compared, compare, other_plan, parse_lengths
from meshwright.planner.explain import Explained, Remedy, explain, remedies
from meshwright.planner.scaling import (
    AtCount,
    TargetAnswer,
    fewest_gpus,
    parse_counts,
    parse_target,
    scaling,
)
from meshwright.planner.variants import described, fixing, on_gpus, parse_choices

MOST_PLANS = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """A file, or a model and GPUs by name; and what is to be said beside the ranked plans."""

    file: str | None = None
    model: str | None = None
    gpu: str | None = None
    gpus: int | None = None
    batch: int | None = None
    length: int | None = None
    explain: str | None = None
    scaling: str | None = None
    target: str | None = None
    top: int | None = None
    overrides: tuple[str, ...] = ()
    against: str | None = None
    lengths: str | None = None


@dataclass(frozen=True)
class Answered:
    """The ranked plans, and the answers to what was asked beside them; `shown` is how many to print."""

    answer: Answer
    shown: int | None
    explained: Explained | None = None
    scaling: tuple[AtCount, ...] | None = None
    target: TargetAnswer | None = None
    remedies: tuple[Remedy, ...] = ()
    compared: Compared | None = None

    def document(self) -> dict[str, Any]:
        """All of it as JSON."""
        document = self.answer.document()
        if self.explained is not None:
            document["explain"] = self.explained.document()
        if self.scaling is not None:
            document["scaling"] = [row.document() for row in self.scaling]
        if self.target is not None:
            document["target"] = self.target.document()
        if self.compared is not None:
            document["against"] = self.compared.document()
        if self.remedies:
            document["remedies"] = [{"change": r.change, "feasible": r.feasible} for r in self.remedies]
        return document

    def write(self, path: str) -> None:
        """Write the best plan's file. Raises InputError where no plan fits."""
        best = self.answer.best
        if best is None:
            raise InputError("--output", path, "no plan fits, so there is none to write")
        write_plan(best.plan.model_copy(update={"predictions": best.predictions()}), path)


def answered(request: Request, progress: Progress = unwatched) -> Answered:
    """Search, and answer all that was asked. Raises InputError for what cannot be asked, before searching."""
    deployment, taken = _deployment(request)
    top = TOP if request.top is None else request.top
    if not 1 <= top <= MOST_PLANS:
        raise InputError("--top", top, f"between 1 and {MOST_PLANS} plans", [TOP])
    counts = None if request.scaling is None else parse_counts(request.scaling)
    target = None if request.target is None else parse_target(request.target)
    if request.lengths is not None and request.against is None:
        rule = "lengths are those of a comparison; name the file to compare with"
        raise InputError("--lengths", request.lengths, rule, ["--against FILE"])
    lengths = parse_lengths(request.lengths, deployment.workload)
    other = None if request.against is None else other_plan(request.against, deployment)
    for count in counts or ():
        on_gpus(deployment, count, "--scaling")
    if request.explain is not None:
        fixing(deployment, parse_choices(request.explain))
    answer = plan_deployment(deployment, top, progress, taken=taken)
    result = Answered(answer, request.top)
    if request.explain is not None:
        result = replace(result, explained=explain(answer, request.explain, progress))
    if counts is not None:
        result = replace(result, scaling=tuple(scaling(deployment, counts, progress)))
    if target is not None:
        result = replace(result, target=fewest_gpus(deployment, target, progress))
    if other is not None and answer.best is not None:
        result = replace(result, compared=compare(other.name, answer.best, other, lengths))
    if answer.best is None:
        result = replace(result, remedies=tuple(remedies(answer)))
    return result


def _deployment(request: Request) -> tuple[Deployment, dict[str, str]]:
    named = {"--model": request.model, "--gpu": request.gpu, "--gpus": request.gpus}
    sized = {"--batch": request.batch, "--seq": request.length}
    if request.file is not None:
        for flag, value in (named | sized).items():
            if value is not None:
                rule = "a file says it; change it there or with --set"
                raise InputError(flag, value, rule, ["--set workload.global_batch_size=512"])
        return open_placement(request.file, Deployment, request.overrides), {}
    if request.model is None or request.gpu is None or request.gpus is None:
        missing = next(flag for flag, value in named.items() if value is None)
        rule = "without a file, a model, a GPU and a number of GPUs are named"
        raise InputError(missing, "missing", rule, ["--model qwen3-30b-a3b --gpu h100-sxm --gpus 512"])
    return described(
        request.model, request.gpu, request.gpus, request.batch, request.length, request.overrides
    )
