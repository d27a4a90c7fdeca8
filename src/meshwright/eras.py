"""Generations of an engine: what each overlaps with compute, as data with a source for every fact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files

from meshwright.engines import Fact
from meshwright.errors import InputError
from meshwright.files import Noun, parse_yaml
from meshwright.policy import EngineName


class Era(Noun):
    """What one generation of an engine runs beside compute.

    `tensor`: collectives of tensor-parallel regions; `data`: gradient reduction and parameter gathering of
    a step; `gather`: ZeRO-3's gathers; `pipeline`: sends under interleaving; `context`: the exchange of keys
    and values.
    """

    engine: EngineName
    title: str
    tensor: Fact[bool]
    data: Fact[bool]
    gather: Fact[bool]
    pipeline: Fact[bool]
    context: Fact[bool]
    flash_attention: Fact[bool]
    attention: Fact[dict[str, float]] | None = None
    graphed: Fact[tuple[str, ...]] | None = None
    step: Fact[str] | None = None

    def launches_graphs(self, gpu: str) -> bool:
        """Whether recipes of this era launch captured CUDA graphs on a GPU, by its catalogue name."""
        return self.graphed is not None and gpu in self.graphed.value

    def attention_slowdown(self, generation: str) -> float:
        """How much longer this era's attention kernels take than the measured ones, on a GPU generation."""
        return 1.0 if self.attention is None else self.attention.value.get(generation, 1.0)


@cache
def eras() -> Mapping[str, Era]:
    """Every era by name."""
    text = package_files("meshwright").joinpath("catalog/eras.yaml").read_text("utf-8")
    return {name: Era.model_validate(entry) for name, entry in parse_yaml(text, "eras.yaml").items()}


def era_named(name: str) -> Era:
    """One era. Raises InputError for a name that does not exist."""
    if name not in eras():
        raise InputError("era", name, "not a generation of an engine", list(eras()))
    return eras()[name]


def era_of(engine: EngineName) -> str:
    """The era that `plan` takes for an engine: the first one listed."""
    return next(name for name, era in eras().items() if era.engine == engine)
