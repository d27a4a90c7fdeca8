"""Bucketed sequences: each piece of a document padded to one of a few lengths.

Documents are cut into pieces of at most the longest length. In each epoch the pieces come in an order of its
own; each waits in its bucket until that holds a batch. What waits at an epoch's end goes on waiting in the
next. So batch j of a bucket is the pieces j·B to (j+1)·B of that bucket's stream over all epochs, and it
comes when its last piece has come. As a bucket gets the same number of pieces in every epoch, what waits
follows from the epoch's number: nothing has to be replayed.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshwright.runtime.data.batch import IntArray, Pieces
from meshwright.runtime.data.shuffling import Purpose, permutation

_EPOCHS_KEPT = 3  # a batch lies in one or two, unless its bucket is rare


@dataclass(frozen=True)
class _Epoch:
    """One epoch: pieces of each bucket in their order, and the batches that get full, in theirs.

    Batch i of the epoch is number `batches[i]` of all that its bucket `of_bucket[i]` ever fills.
    """

    pieces: list[IntArray]
    of_bucket: IntArray
    batches: IntArray


def bucket_lengths(shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths shortest·2ⁱ below the longest, and the longest."""
    lengths = []
    while shortest < longest:
        lengths.append(shortest)
        shortest *= 2
    return (*lengths, longest)


class BucketedOrder:
    """Which pieces of documents make up each batch.

    A position counts sequences that were handed out: a multiple of the batch size.
    """

    def __init__(self, offsets: IntArray, seed: int, batch_size: int, shortest: int, longest: int) -> None:
        self.lengths = bucket_lengths(shortest, longest)
        self.batch_size = batch_size
        self._seed = seed
        self._cut(offsets, longest)
        self._bucket = np.searchsorted(np.array(self.lengths), self._length)
        counts = np.bincount(self._bucket, minlength=len(self.lengths))
        self._counts: list[int] = counts.tolist()
        self._epoch = lru_cache(_EPOCHS_KEPT)(self._ordered)

    def _cut(self, offsets: IntArray, longest: int) -> None:
        """Cut documents into pieces: where each starts, how long it is, and where its document ends."""
        num_pieces = -(-np.diff(offsets) // longest)
        within = np.arange(int(num_pieces.sum())) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        self._start = np.repeat(offsets[:-1], num_pieces) + within * longest
        self._end = np.repeat(offsets[1:], num_pieces)
        self._length = np.minimum(longest, self._end - self._start)
        self._num_targets = self._length - (self._start + self._length == self._end)

    def pick(self, position: int, rows: range) -> tuple[Pieces, int, int]:
        """Pieces of some rows of the batch at a position, its width S, and targets in all of its rows."""
        number = position // self.batch_size
        epoch = self._epoch_of(number)
        within = number - self._batches_before(epoch)
        bucket = int(self._epoch(epoch).of_bucket[within])
        first = int(self._epoch(epoch).batches[within]) * self.batch_size
        chosen = self._from_bucket(bucket, first)
        num_targets = int(self._num_targets[chosen].sum())
        chosen = chosen[rows.start : rows.stop : rows.step]
        pieces = Pieces(np.arange(len(chosen)), self._start[chosen], self._length[chosen], self._end[chosen])
        return pieces, self.lengths[bucket], num_targets

    def _batches_before(self, epoch: int) -> int:
        """Batches that are full before an epoch begins."""
        return sum(epoch * count // self.batch_size for count in self._counts)

    def _epoch_of(self, batch: int) -> int:
        """The epoch in which a batch gets full."""
        # Each bucket keeps less than a batch waiting, which bounds the epochs it can take.
        most = (batch + len(self.lengths) + 1) * self.batch_size // sum(self._counts) + 1
        return bisect_right(range(most + 1), batch, key=self._batches_before) - 1

    def _ordered(self, epoch: int) -> _Epoch:
        order = permutation(len(self._start), self._seed, epoch, Purpose.DOCUMENTS)
        bucket_of = self._bucket[order]
        pieces, full_at, of_bucket, batches = [], [], [], []
        for bucket, count in enumerate(self._counts):
            places = np.flatnonzero(bucket_of == bucket)
            pieces.append(order[places])
            before = epoch * count  # pieces of this bucket in the epochs before
            last = np.arange((-before - 1) % self.batch_size, count, self.batch_size)
            full_at.append(places[last])
            of_bucket.append(np.full(len(last), bucket))
            batches.append((before + last) // self.batch_size)
        by_time = np.argsort(np.concatenate(full_at))
        return _Epoch(pieces, np.concatenate(of_bucket)[by_time], np.concatenate(batches)[by_time])

    def _from_bucket(self, bucket: int, first: int) -> IntArray:
        """A batch of pieces from a bucket's stream [batch size], from its piece number `first` on."""
        found: list[IntArray] = []
        missing = self.batch_size
        while missing:
            epoch, skipped = divmod(first, self._counts[bucket])
            taken = self._epoch(epoch).pieces[bucket][skipped : skipped + missing]
            found.append(taken)
            missing -= len(taken)
            first += len(taken)
        return np.concatenate(found)
