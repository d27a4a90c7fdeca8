"""How sure a step time is: the residuals of predictions on recipes that were held back from the fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files as package_files
from math import exp

from meshwright.cluster import Cluster
from meshwright.cost.constants import generation_of
from meshwright.files import Noun, parse_yaml
from meshwright.model import Model
from meshwright.plan import Plan
from meshwright.policy import EngineName
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


def closest(group: str, generation: str, num_gpus: int = 1) -> str:
    """The runs of a group whose residuals say most of a plan: those on its generation of GPUs where there are
    enough of them, and one on as many GPUs, else all."""
    narrow = f"{group}/{generation}"
    return narrow if narrow in residuals() and num_gpus <= MOST_GPUS.get(narrow, num_gpus) else group


UNMEASURED = 2.0
"""How much wider an interval is, in logarithms, where no run of the engine, of the GPU's generation or on so
many GPUs has been measured, or the file states what kernels reach: assumed."""
MEASURED_ENGINES: Mapping[str, tuple[str, ...]] = {
    "dense": ("megatron", "torchtitan", "deepspeed"),
    "moe_full": ("megatron",),
    "moe_efa": ("megatron",),
}
"""Engines with measured runs in each group of them."""
MOST_GPUS: Mapping[str, int] = {
    "dense": 16384,
    "dense/ampere": 12288,
    "dense/hopper": 1024,
    "dense/blackwell": 256,
    "moe_full": 256,
    "moe_efa": 256,
}
"""GPUs of the largest measured run of each group, and of those on a generation of GPUs
(benchmarks/accuracy/training_runs.csv)."""


@dataclass(frozen=True)
class Width:
    """How wide an interval is, the group of measured runs it comes from (`like`, those of the group that are
    closest), and why it is wider than theirs."""

    group: str
    like: str
    half_width: float
    wider: tuple[str, ...]

    @property
    def factor(self) -> float:
        """The interval reaches from the step time over this factor to the step time times it."""
        return exp(self.half_width)

    @property
    def words(self) -> str:
        """What the interval rests on."""
        rows, most = residuals()[self.like].rows, MOST_GPUS.get(self.like, MOST_GPUS[self.group])
        kind, _, generation = self.like.partition("/")
        runs = f"{kind} runs on {generation} GPUs" if generation else f"{kind} runs"
        text = f"80 % of {rows} measured {runs} (at most {most:,} GPUs) lie within a factor "
        text += f"{exp(half_width_of(self.like)):.2f}"
        if not self.wider:
            return text
        return f"{text}; taken here: {self.factor:.2f}, assumed, because {' and '.join(self.wider)}"


def width_of(model: Model, cluster: Cluster, engine: EngineName) -> Width:
    """The width of the interval of plans of a model on a cluster with an engine."""
    group = group_of(model, cluster)
    wider = []
    kind = "MoE" if model.is_moe else "dense"
    if engine not in MEASURED_ENGINES[group]:
        wider.append(f"no {kind} run of the {engine} engine has been measured with its settings stated")
    if cluster.num_gpus > MOST_GPUS[group]:
        wider.append(f"no such run on more than {MOST_GPUS[group]:,} GPUs has been measured")
    if cluster.efficiency is not None and cluster.efficiency.compute is not None:
        wider.append("the file states what kernels reach")
    elif generation_of(cluster.gpu.name) == "other":
        wider.append(f"no run on {cluster.gpu.name} has been measured")
    like = closest(group, generation_of(cluster.gpu.name), cluster.num_gpus)
    return Width(group, like, half_width_of(like) * (UNMEASURED if wider else 1.0), tuple(wider))


def interval(plan: Plan, step_time_s: float) -> tuple[float, float]:
    """The 80 % interval around a plan's step time, in seconds."""
    factor = width_of(plan.model, plan.cluster, plan.policy.engine).factor
    return step_time_s / factor, step_time_s * factor


def ratio_factor(model: Model, cluster: Cluster) -> float:
    """The ratio of two step times of one model on one kind of machine, at different numbers of GPUs, lies
    within this factor of the predicted ratio in 80 % of cases (decision 0011).

    It is as wide as the interval of one measured step time, and no wider: what the model gets wrong in both
    cancels, so that nothing is added for an engine or a GPU that no run stands behind.
    """
    generation = generation_of(cluster.gpu.name)
    return exp(half_width_of(closest(group_of(model, cluster), generation, cluster.num_gpus)))
