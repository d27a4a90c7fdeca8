"""Rectangles of a tensor: flat ranges cut into them, and whether a set of them makes up the whole.

A rectangle is its offsets in the whole tensor and its sizes, one of each per dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]


def rectangles(local_shape: Sequence[int], start: int, stop: int) -> list[Rectangle]:
    """A flat half-open range of a row-major tensor as the fewest rectangles.

    Each rectangle is one contiguous run of the range; they are disjoint, in order, and cover exactly the
    range. At most 2·dims − 1 are needed. Raises ValueError when the range leaves the tensor.
    """
    shape = tuple(local_shape)
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"range [{start}, {stop}) is not inside a tensor of shape {shape}")
    runs = []
    while start < stop:
        sizes = _longest_run(shape, start, stop)
        runs.append((_position(shape, start), sizes))
        start += prod(sizes)
    return runs


def _longest_run(shape: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """Sizes of the largest rectangle that begins at `start` and ends by `stop`."""
    if not shape:
        return ()
    dim, block = len(shape) - 1, 1
    while dim and start % (block * shape[dim]) == 0 and start + block * shape[dim] <= stop:
        block *= shape[dim]
        dim -= 1
    index = start // block % shape[dim]
    count = min(shape[dim] - index, (stop - start) // block)
    return (1,) * dim + (count,) + shape[dim + 1 :]


def _position(shape: tuple[int, ...], flat: int) -> tuple[int, ...]:
    offsets = []
    for size in reversed(shape):
        flat, offset = divmod(flat, size)
        offsets.append(offset)
    return tuple(reversed(offsets))


def inside(shape: Sequence[int], part: Rectangle) -> bool:
    """Whether a rectangle has the tensor's dims and does not leave it."""
    offsets, sizes = part
    return len(offsets) == len(sizes) == len(shape) and all(
        offset >= 0 and size >= 0 and offset + size <= whole
        for offset, size, whole in zip(offsets, sizes, shape, strict=True)
    )


def spelled(part: Rectangle) -> str:
    """A rectangle as people write it: `[0:4, 8:16]`."""
    ranges = ", ".join(f"{offset}:{offset + size}" for offset, size in zip(*part, strict=False))
    return f"[{ranges}]"


def tiling_problem(shape: Sequence[int], parts: Iterable[Rectangle]) -> str | None:
    """Why distinct rectangles are not a disjoint cover of a whole tensor; None when they are.

    Inside and disjoint, they cover the tensor exactly when their volumes add up to its.
    """
    filled = []
    for part in parts:
        if not inside(shape, part):
            return f"part {spelled(part)} leaves the shape {tuple(shape)}"
        if prod(part[1]):
            filled.append(part)
    overlap = _first_overlap(len(shape), filled)
    if overlap is not None:
        return f"parts {spelled(overlap[0])} and {spelled(overlap[1])} overlap without being equal"
    missing = prod(shape) - sum(prod(sizes) for _, sizes in filled)
    if missing:
        return f"{missing:,} of its {prod(shape):,} elements are in no part"
    return None


def _first_overlap(num_dims: int, parts: list[Rectangle]) -> tuple[Rectangle, Rectangle] | None:
    """Two rectangles that share an element, by a sweep along the dim that tells most of them apart."""
    if not num_dims:
        return (parts[0], parts[1]) if len(parts) > 1 else None
    sweep = max(range(num_dims), key=lambda dim: len({offsets[dim] for offsets, _ in parts}))
    active: list[Rectangle] = []
    for part in sorted(parts, key=lambda part: part[0][sweep]):
        start = part[0][sweep]
        active = [other for other in active if other[0][sweep] + other[1][sweep] > start]
        for other in active:
            if _share_an_element(part, other):
                return other, part
        active.append(part)
    return None


def _share_an_element(part: Rectangle, other: Rectangle) -> bool:
    return all(
        offset < other_offset + other_size and other_offset < offset + size
        for offset, size, other_offset, other_size in zip(*part, *other, strict=True)
    )
