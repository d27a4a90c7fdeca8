"""The few global constants of the step-time model that no kernel or link measurement gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files as package_files
from typing import Literal

from meshwright.files import Noun, parse_yaml

Generation = Literal["ampere", "hopper", "blackwell", "blackwell-ultra", "other"]

GENERATION_OF: Mapping[str, Generation] = {
    "a100": "ampere",
    "a800": "ampere",
    "h100": "hopper",
    "h200": "hopper",
    "h800": "hopper",
    "h20": "hopper",
    "gh200": "hopper",
    "b200": "blackwell",
    "b300": "blackwell-ultra",
    "gb200": "blackwell",
    "gb300": "blackwell-ultra",
}
"""By the first word of a GPU's catalogue name."""


def generation_of(gpu: str) -> Generation:
    """The generation of a GPU by its catalogue name; `other` for all but NVIDIA's of 2020 and later."""
    return GENERATION_OF.get(gpu.split("-")[0], "other")


class Constant(Noun):
    """One fitted value, its unit and where it comes from."""

    value: float
    unit: str
    source: str


class Constants(Noun):
    """Every global constant beyond the curves of kernels and links.

    `slowdown`: how much longer matmuls and attention take inside a step than alone, by GPU generation;
    `grouped`: how much of that grouped matmuls feel, which memory bounds more than power; `memory`: the same
    as slowdown for ops that memory bandwidth bounds. `host`: seconds that a process needs to launch one op:
    of a dense block, of a block with experts whose sizes come back from the GPU, and from a captured graph.
    `hidden`: shares of communication that run beside compute where an era overlaps it. `fp8_cast`: how much
    of what casting to fp8 takes alone shows inside a step. `network`: slowdown of links that leave a node;
    `efa`: seconds that an exchange of DeepEP or HybridEP takes longer over EFA, which no GPU can start a
    transfer on: threads of the host send for it. `step`: seconds per step outside the model, today and in
    the software of 2021 (`early`). `natural_routing`: load of the fullest rank over the mean where routing
    is real and not described.
    """

    slowdown: Mapping[str, Constant]
    grouped: Constant
    memory: Constant
    host: Mapping[str, Constant]
    hidden: Mapping[str, Constant]
    fp8_cast: Constant
    network: Constant
    efa: Constant
    step: Mapping[str, Constant]
    natural_routing: Constant

    def flat(self) -> Iterator[tuple[str, Constant]]:
        """Every constant with its dotted name."""
        for name in type(self).model_fields:
            entry = getattr(self, name)
            if isinstance(entry, Constant):
                yield name, entry
            else:
                yield from ((f"{name}.{key}", constant) for key, constant in entry.items())

    def changed(self, values: Mapping[str, float]) -> Constants:
        """The same constants with some values replaced, by dotted name."""
        document = self.model_dump()
        for name, value in values.items():
            entry = document
            for word in name.split("."):
                entry = entry[word]
            entry["value"] = value
        return type(self).model_validate(document)

    def replaced(self, name: str, update: Mapping[str, object]) -> Constants:
        """The same constants with fields of one entry replaced, unchecked: a value may be an array."""
        field, _, key = name.partition(".")
        entry = getattr(self, field)
        new = {**entry, key: entry[key].model_copy(update=update)} if key else entry.model_copy(update=update)
        return self.model_copy(update={field: new})


@cache
def constants() -> Constants:
    """The constants of the catalogue."""
    text = package_files("meshwright").joinpath("catalog/constants.yaml").read_text("utf-8")
    return Constants.model_validate(parse_yaml(text, "constants.yaml"))
