"""What one rank holds of a whole tensor, in the form that torch.distributed.checkpoint (DCP) asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from meshwright.runtime.checkpoint.rectangles import Rectangle, inside, rectangles, spelled

Ranges = Sequence[tuple[int, int]]
"""Half-open index ranges in the whole tensor, one per dim, as in `ir.sharding.LocalSlice`."""


@dataclass(frozen=True)
class Piece:
    """One rectangle of a whole tensor. The tensor may be a view of any strides; loading fills it in place."""

    offsets: tuple[int, ...]
    tensor: Tensor

    @property
    def rectangle(self) -> Rectangle:
        """Where the piece lies in the whole tensor."""
        return self.offsets, tuple(self.tensor.shape)


@dataclass(frozen=True)
class Pieces:
    """What this rank holds of one whole tensor: any number of rectangles, none at all among them.

    The three double-underscored methods are DCP's protocol for objects that are not tensors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def filled(self) -> list[Piece]:
        """The pieces that hold an element."""
        return [piece for piece in self.pieces if piece.tensor.numel()]

    def problem(self) -> str | None:
        """What is wrong with the pieces by themselves; None when nothing is."""
        for piece in self.pieces:
            if not inside(self.shape, piece.rectangle):
                return f"part {spelled(piece.rectangle)} leaves the shape {self.shape}"
            if piece.tensor.dtype != self.dtype:
                return f"part {spelled(piece.rectangle)} is {piece.tensor.dtype}, the tensor is {self.dtype}"
        return None

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """DCP: one item per rectangle; a tensor without elements is written too, so that its name is kept."""
        if not prod(self.shape):
            return [self._write_item(fqn, ((0,) * len(self.shape), self.shape))]
        return [self._write_item(fqn, piece.rectangle) for piece in self.filled]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """DCP: the rectangles to be read, in the order of `filled`."""
        return [_chunk(piece.rectangle) for piece in self.filled]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """DCP: the tensor behind a rectangle. On loading the index counts this rank's rectangles; on saving
        it counts those of all ranks, and only the offsets speak."""
        filled = self.filled
        hint = index.index
        if hint is not None and hint < len(filled) and filled[hint].offsets == index.offset:
            return filled[hint].tensor
        for piece in filled:
            if piece.offsets == index.offset:
                return piece.tensor
        if not prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        raise ValueError(f"{index.fqn}: no part at {index.offset}")

    def _write_item(self, fqn: str, rectangle: Rectangle) -> WriteItem:
        data = TensorWriteData(
            chunk=_chunk(rectangle),
            properties=TensorProperties(dtype=self.dtype),
            size=torch.Size(self.shape),
        )
        return WriteItem(MetadataIndex(fqn, rectangle[0]), WriteItemType.SHARD, tensor_data=data)


def _chunk(rectangle: Rectangle) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(rectangle[0]), torch.Size(rectangle[1]))


def whole(tensor: Tensor) -> Pieces:
    """A tensor that this rank holds all of."""
    shape = tuple(tensor.shape)
    return Pieces(shape, tensor.dtype, (Piece((0,) * len(shape), tensor),))


def local_pieces(ranges: Ranges, tensor: Tensor, whole_shape: Sequence[int]) -> Pieces:
    """The local tensor of a rank, with the index ranges that it holds. Where the tensor is larger than the
    ranges (a padded tail), the tail is no part of the whole and is left out."""
    offsets, sizes = _offsets_and_sizes(ranges)
    if len(sizes) != tensor.dim() or any(size > n for size, n in zip(sizes, tensor.shape, strict=True)):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} does not hold the ranges {tuple(ranges)}")
    valid = tensor[tuple(slice(size) for size in sizes)]
    return Pieces(tuple(whole_shape), tensor.dtype, (Piece(offsets, valid),))


def flat_pieces(
    local_slice_ranges: Ranges,
    flat_tensor_view: Tensor,
    start: int,
    stop: int,
    whole_shape: Sequence[int],
    local_shape: Sequence[int] | None = None,
) -> Pieces:
    """The flat range [start, stop) of a rank's local tensor, as a ZeRO shard holds it.

    `local_slice_ranges` are the index ranges of the local tensor in the whole one; `flat_tensor_view` holds
    the `stop − start` elements, and each piece is a view of it. `local_shape` is the shape over which the
    range counts where padding makes it larger than the ranges; padding is left out of the pieces.
    """
    offsets, sizes = _offsets_and_sizes(local_slice_ranges)
    if flat_tensor_view.dim() != 1 or len(flat_tensor_view) != stop - start:
        shape = tuple(flat_tensor_view.shape)
        raise ValueError(f"a flat tensor of {stop - start} elements is needed, not one of shape {shape}")
    pieces, done = [], 0
    for inner, run in rectangles(sizes if local_shape is None else local_shape, start, stop):
        count = prod(run)
        view = flat_tensor_view[done : done + count].view(run)
        done += count
        valid = [max(0, min(size, n - o)) for size, n, o in zip(run, sizes, inner, strict=True)]
        if prod(valid):
            position = tuple(outer + o for outer, o in zip(offsets, inner, strict=True))
            pieces.append(Piece(position, view[tuple(slice(size) for size in valid)]))
    return Pieces(tuple(whole_shape), flat_tensor_view.dtype, tuple(pieces))


def _offsets_and_sizes(ranges: Ranges) -> Rectangle:
    return tuple(start for start, _ in ranges), tuple(stop - start for start, stop in ranges)
