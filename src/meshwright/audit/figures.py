"""The figures that an audit understands, each with its unit and how it is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from meshwright.audit import layout_figures as layout
from meshwright.audit import memory_figures as memory
from meshwright.audit import time_figures as time
from meshwright.audit.answer import Answer, Value
from meshwright.audit.context import Context
from meshwright.audit.time_figures import STATED_SHARE
from meshwright.claims import Figure
from meshwright.errors import InputError
from meshwright.units import BYTES, FLOPS_PER_S, SECONDS, Dimension, format_count


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One kind of figure: its unit, whether it is an exact count, and how it is recomputed."""

    unit: str
    answer: Callable[[Context, Figure], Answer]
    dimension: Dimension | None = None
    exact: bool = False

    def parse(self, figure: Figure) -> Value:
        """The stated value in SI units. Raises InputError where the unit is missing or wrong."""
        key = f"claims.figures.{figure.id}"
        if self.unit == "rank ranges":
            if isinstance(figure.value, tuple):
                return tuple(item.replace("–", "-").replace(" ", "") for item in figure.value)
            raise InputError(key, figure.value, "a list of rank ranges", ["[0-127, 128-255]"])
        if isinstance(figure.value, tuple):
            raise InputError(key, list(figure.value), "one value, not a list")
        if self.dimension is not None:
            return self.dimension.parse(figure.value, key)
        if isinstance(figure.value, str):
            raise InputError(key, figure.value, f"a plain number ({self.unit}) without a unit")
        if figure.value < 0:
            raise InputError(key, figure.value, f"a number of {self.unit} is not negative", [-figure.value])
        return figure.value

    def format(self, value: Value) -> str:
        """A value as a person reads it."""
        if isinstance(value, tuple):
            return ", ".join(value[:4]) + (" …" if len(value) > 4 else "")
        if self.dimension is not None:
            return self.dimension.format(value)
        return format_count(value)


def figure_kind(figure: Figure) -> FigureKind:
    """The kind of a figure by its id. Raises InputError with the nearest ids."""
    if figure.id in FIGURES:
        return FIGURES[figure.id]

    near = get_close_matches(figure.id, FIGURES, n=3, cutoff=0.3) or list(FIGURES)
    raise InputError("claims.figures.id", figure.id, "not a figure that the audit understands", near)


FIGURES: Mapping[str, FigureKind] = {
    "parameters": FigureKind("parameters", layout.parameters),
    "head_dim": FigureKind("elements", layout.head_dim, exact=True),
    "world_size": FigureKind("GPUs", layout.world_size, exact=True),
    "tensor_parallel": FigureKind("ranks", layout.degree("tp"), exact=True),
    "pipeline_parallel": FigureKind("ranks", layout.degree("pp"), exact=True),
    "expert_parallel": FigureKind("ranks", layout.degree("ep"), exact=True),
    "data_parallel": FigureKind("ranks", layout.degree("dp"), exact=True),
    "layers_per_stage": FigureKind("layers", layout.layers_per_stage, exact=True),
    "experts_per_gpu": FigureKind("experts", layout.per("num_experts", "ep", "experts"), exact=True),
    "hidden_per_tp_rank": FigureKind(
        "elements", layout.per("hidden_size", "tp", "hidden elements"), exact=True
    ),
    "heads_per_tp_rank": FigureKind("heads", layout.per("num_attention_heads", "tp", "heads"), exact=True),
    "sequences_per_replica": FigureKind("sequences", layout.sequences_per_replica, exact=True),
    "micro_batch_size": FigureKind("sequences", layout.micro_batch_size, exact=True),
    "num_micro_batches": FigureKind("micro-batches", layout.num_micro_batches, exact=True),
    "stage_ranks": FigureKind("rank ranges", layout.stage_ranks),
    "bubble_fraction": FigureKind("fraction", layout.bubble_fraction, STATED_SHARE),
    "parameter_memory": FigureKind("bytes", memory.parameter_memory, BYTES),
    "gradient_memory": FigureKind("bytes", memory.gradient_memory, BYTES),
    "optimizer_memory": FigureKind("bytes", memory.optimizer_memory, BYTES),
    "optimizer_ratio": FigureKind("bytes per byte", memory.optimizer_ratio),
    "activation_memory": FigureKind("bytes", memory.activation_memory, BYTES),
    "total_memory": FigureKind("bytes", memory.total_memory, BYTES),
    "memory_utilization": FigureKind("fraction", memory.memory_utilization, STATED_SHARE),
    "memory_efficiency": FigureKind("fraction", memory.memory_efficiency, STATED_SHARE),
    "effective_flops": FigureKind("FLOP/s", time.effective_flops, FLOPS_PER_S),
    "step_time": FigureKind("s", time.step_time, SECONDS),
    "sequences_per_s": FigureKind("sequences/s", time.sequences_per_s),
    "mfu": FigureKind("fraction", time.mfu, STATED_SHARE),
    "strong_scaling_efficiency": FigureKind("fraction", time.strong_scaling_efficiency, STATED_SHARE),
    "bandwidth_utilization": FigureKind("fraction", time.bandwidth_utilization, STATED_SHARE),
}
