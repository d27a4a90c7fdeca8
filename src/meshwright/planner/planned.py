"""The plan of a file, for commands that run one: as it was planned, or with what it leaves open planned."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.deployment import Deployment
from meshwright.errors import InputError
from meshwright.files import read_yaml
from meshwright.layout import LayoutRequest
from meshwright.plan import Plan, open_placement, resolve
from meshwright.planner.answer import Progress, plan_deployment, unwatched
from meshwright.policy import EngineName, PolicyRequest


def planned(
    path: str, overrides: Sequence[str] = (), engine: EngineName | None = None, progress: Progress = unwatched
) -> Plan:
    """The plan that a file holds; what a deployment leaves open of layout and policy is searched.

    `engine` is the one that will run it, where the file names none. Raises InputError where no plan fits.
    """
    deployment = open_placement(path, Deployment, overrides)
    if deployment.policy.engine is None and engine is not None:
        policy = deployment.policy.model_copy(update={"engine": engine})
        deployment = deployment.model_copy(update={"policy": policy})
    if not is_open(deployment) or "digest" in read_yaml(path):
        return resolve(deployment)
    best = plan_deployment(deployment, 1, progress).best
    if best is None:
        rule = "no plan fits the cluster's memory; `meshwright plan` says what comes nearest"
        raise InputError("layout", "open", rule)
    return best.plan.model_copy(update={"predictions": best.predictions()})


def is_open(deployment: Deployment) -> bool:
    """Whether a deployment leaves a choice of layout or policy to the planner."""
    left = {"settings", "layers_per_stage"}  # the engine's usual, and as even as can be
    return _has_gap(deployment.layout, set()) or _has_gap(deployment.policy, left)


def _has_gap(request: LayoutRequest | PolicyRequest, left: set[str]) -> bool:
    return any(value is None for name, value in request if name not in left)
