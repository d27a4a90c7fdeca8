"""First weights, which do not depend on the layout.

Every parameter has a stream of random numbers of its own, keyed by the seed and its name, in which an
element's place is its place in the whole parameter: a rank makes only the rows that it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from meshwright.ir.parameters import Param
from meshwright.ir.sharding import LocalSlice
from meshwright.model import Model

STANDARD_DEVIATION = 0.02
"""Of all weights (GPT-2; Megatron-LM --init-method-std). Projections onto the residual stream have it divided
by sqrt(2 · layers) (Radford et al. 2019, §2.3; Megatron-LM scaled_init_method_normal)."""
_ONTO_THE_STREAM = (".o.weight", ".down.weight", ".experts.down")
_BLOCK = 4
"""Numbers that one step of the Philox counter gives (Salmon et al. 2011)."""


def initial_values(model: Model, param: Param, held: LocalSlice, seed: int) -> Tensor:
    """The values of a rank's part of a parameter, FP32, of the held shape.

    Norms start at 1, biases and sinks at 0, all else normally distributed around 0.
    """
    if param.part == "norms" or param.name.endswith("norm.weight"):
        ones = not param.name.endswith(".bias")
        return torch.full(held.shape, 1.0 if ones else 0.0)
    if param.name.endswith((".bias", "_bias", ".sinks")):
        return torch.zeros(held.shape)
    deviation = STANDARD_DEVIATION
    if param.name.endswith(_ONTO_THE_STREAM):
        deviation /= (2 * model.num_hidden_layers) ** 0.5
    values = np.concatenate([_normal(seed, param.name, *run) for run in _rows(param, held)])
    width = held.ranges[-1]
    whole = torch.from_numpy(values).view(*held.shape[:-1], param.shape[-1])
    return whole[..., width[0] : width[1]].contiguous() * deviation


def _rows(param: Param, held: LocalSlice) -> Iterator[tuple[int, int]]:
    """Runs (first, count) of elements that cover the held rows, each of full width."""
    width = param.shape[-1]
    if len(param.shape) == 1:
        yield 0, width
        return
    *outer, (start, stop) = held.ranges[:-1]
    rows = param.shape[-2]
    for index in np.ndindex(*(last - first for first, last in outer)):
        place = 0
        for (first, _), size, offset in zip(outer, param.shape, index, strict=False):
            place = place * size + first + offset
        yield (place * rows + start) * width, (stop - start) * width


def _normal(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Numbers first … first + count of a parameter's stream: Box and Muller on pairs of uniform numbers, so
    that each has a place of its own."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    begin = first // _BLOCK * _BLOCK
    end = -(-(first + count) // _BLOCK) * _BLOCK
    generator = np.random.Philox(key=key)
    generator.advance(begin // _BLOCK)
    raw = generator.random_raw(end - begin).reshape(-1, 2)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    pairs = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
    start = first - begin
    return pairs.reshape(-1)[start : start + count].astype(np.float32)
