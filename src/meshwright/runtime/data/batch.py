"""Rows of a batch out of pieces of documents.

R rows of a batch, S tokens of a row, P pieces, N tokens of all pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from meshwright.runtime.data.tokenizer import TokenArray

IGNORED = -100
"""The target where there is nothing to predict: what `torch.nn.functional.cross_entropy` passes over."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch. All tensors are int64 [rows, tokens of a row].

    `targets` is the next token of the same document, also where that stands in another row, and IGNORED at
    a document's end and in padding. `positions` counts from 0 within a piece of a document. `documents`
    numbers the pieces of a row from 0: tokens attend to their own number only; it is -1 in padding, where
    tokens and positions are 0. `num_targets` counts targets that are not IGNORED in all rows of the global
    batch, whichever rows are here; it is 0 where the batch holds documents of one token alone.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    num_targets: int


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents that lie in rows, one after another from each row's start; all arrays [P].

    A piece is `length` tokens of the corpus from `start`; its document goes on until `end`. Pieces of a row
    stand together, rows in rising order.
    """

    row: IntArray
    start: IntArray
    length: IntArray
    end: IntArray


def build_batch(tokens: TokenArray, pieces: Pieces, num_rows: int, width: int, num_targets: int) -> Batch:
    """The rows [num_rows, width] that the pieces make up, padded behind each row's last piece."""
    lengths = pieces.length
    first_of_row = np.searchsorted(pieces.row, pieces.row)
    begin = np.cumsum(lengths) - lengths
    column = begin - begin[first_of_row]
    within = np.arange(int(lengths.sum())) - np.repeat(begin, lengths)
    source = np.repeat(pieces.start, lengths) + within
    place = np.repeat(pieces.row * width + column, lengths) + within
    end = np.repeat(pieces.end, lengths)
    following = tokens[np.minimum(source + 1, end - 1)].astype(np.int64)

    def rows(values: NDArray[np.generic], padding: int) -> Tensor:
        flat = np.full(num_rows * width, padding, np.int64)
        flat[place] = values
        return torch.from_numpy(flat.reshape(num_rows, width))

    return Batch(
        tokens=rows(tokens[source], 0),
        targets=rows(np.where(source + 1 < end, following, IGNORED), IGNORED),
        positions=rows(within, 0),
        documents=rows(np.repeat(np.arange(len(lengths)) - first_of_row, lengths), -1),
        num_targets=num_targets,
    )
