"""How sure a step time is: the residuals of predictions on recipes that were held back from the fit."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files
from math import exp

from meshwright.cluster import Cluster
from meshwright.files import Noun, parse_yaml
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.units import Count


class Residual(Noun):
    """Half of the 80 % interval of log(predicted / measured) in one group of measured runs, and the rows that
    it comes from."""

    half_width: float
    rows: Count


@cache
def residuals() -> Mapping[str, Residual]:
    """Residuals by group of runs."""
    text = package_files("meshwright").joinpath("catalog/residuals.yaml").read_text("utf-8")
    return {
        name: Residual.model_validate(entry) for name, entry in parse_yaml(text, "residuals.yaml").items()
    }


def half_width_of(group: str) -> float:
    """Half of the 80 % interval of a group, as a difference of logarithms."""
    return residuals()[group].half_width


def group_of(model: Model, cluster: Cluster) -> str:
    """The group of measured runs that plans of a model on a cluster are most like."""
    if not model.is_moe:
        return "dense"
    over_efa = any(link.kind == "efa" for link in cluster.links)
    return "moe_efa" if over_efa else "moe_full"


def interval(plan: Plan, step_time_s: float) -> tuple[float, float]:
    """The 80 % interval around a plan's step time, in seconds."""
    factor = exp(half_width_of(group_of(plan.model, plan.cluster)))
    return step_time_s / factor, step_time_s * factor
