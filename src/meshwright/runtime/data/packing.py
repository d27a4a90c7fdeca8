"""Packed sequences: the stream of documents, cut every S tokens.

An epoch is all documents in an order of its own; epochs follow one another without a gap. Sequence q is the
tokens q·S to (q+1)·S of that stream, so a document that does not fit goes on in another sequence, no token is
lost and none is padding. Sequences that start in the same epoch are handed out in a shuffled order, as in
Megatron-LM's GPTDataset: a batch would else be neighbours out of one long document.

Every sequence follows from its number, the seed and the documents' lengths: nothing has to be replayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from meshwright.runtime.data.batch import IntArray, Pieces
from meshwright.runtime.data.shuffling import Purpose, permutation

_EPOCHS_KEPT = 3  # a batch lies in one or two, unless the corpus is tiny


@dataclass(frozen=True)
class _Epoch:
    """Documents in the order of one epoch [D], and where each starts in it, with T at the end [D + 1]."""

    documents: IntArray
    starts: IntArray


class PackedOrder:
    """Which pieces of which documents make up each sequence of a batch.

    A position counts sequences that were handed out, so batches of any size may go on from it.
    """

    def __init__(self, offsets: IntArray, seed: int, batch_size: int, length: int) -> None:
        self.lengths: tuple[int, ...] = (length,)
        self.batch_size = batch_size
        self._offsets = offsets
        self._seed = seed
        self._length = length
        self._num_documents = len(offsets) - 1
        self._num_tokens = int(offsets[-1])
        self._epoch = lru_cache(_EPOCHS_KEPT)(self._ordered)
        self._sequences_of = lru_cache(_EPOCHS_KEPT)(self._shuffled)

    def pick(self, position: int, rows: range) -> tuple[Pieces, int, int]:
        """Pieces of some rows of the batch at a position, its width S, and targets in all of its rows."""
        sequences = self._sequences(position)
        num_targets = self.batch_size * self._length - self._ends_within(sequences)
        parts = [self._pieces(row, int(sequences[number])) for row, number in enumerate(rows)]
        nothing = np.zeros((4, 0), np.int64)
        return Pieces(*np.concatenate([nothing, *parts], axis=1)), self._length, num_targets

    def _first_sequence(self, epoch: int) -> int:
        """The first sequence that starts in an epoch."""
        return -(-epoch * self._num_tokens // self._length)

    def _ordered(self, epoch: int) -> _Epoch:
        documents = permutation(self._num_documents, self._seed, epoch, Purpose.DOCUMENTS)
        lengths = np.diff(self._offsets)[documents]
        return _Epoch(documents, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))

    def _shuffled(self, epoch: int) -> IntArray:
        first, end = self._first_sequence(epoch), self._first_sequence(epoch + 1)
        return first + permutation(end - first, self._seed, epoch, Purpose.SEQUENCES)

    def _sequences(self, position: int) -> IntArray:
        """Numbers of the sequences of the batch at a position [batch size]."""
        found: list[IntArray] = []
        missing = self.batch_size
        while missing:
            epoch = position * self._length // self._num_tokens
            shuffled = self._sequences_of(epoch)
            skipped = position - self._first_sequence(epoch)
            taken = shuffled[skipped : skipped + missing]
            found.append(taken)
            missing -= len(taken)
            position += len(taken)
        return np.concatenate(found)

    def _pieces(self, row: int, sequence: int) -> IntArray:
        """Pieces of one sequence, as rows of `Pieces` [4, P]."""
        begin, end = sequence * self._length, (sequence + 1) * self._length
        parts: list[IntArray] = []
        while begin < end:
            number, low = divmod(begin, self._num_tokens)
            high = min(low + end - begin, self._num_tokens)
            epoch = self._epoch(number)
            first = int(np.searchsorted(epoch.starts, low, "right")) - 1
            last = int(np.searchsorted(epoch.starts, high, "left"))
            starts, documents = epoch.starts[first : last + 1], epoch.documents[first:last]
            from_, to = np.maximum(starts[:-1], low), np.minimum(starts[1:], high)
            source = self._offsets[documents] + from_ - starts[:-1]
            parts.append(
                np.stack([np.full(last - first, row), source, to - from_, self._offsets[documents + 1]])
            )
            begin += high - low
        return np.concatenate(parts, axis=1)

    def _ends_within(self, sequences: IntArray) -> int:
        """Documents that end inside these sequences: as many of their tokens have no target."""
        begins = sequences * self._length
        return int((self._ends_before(begins + self._length) - self._ends_before(begins)).sum())

    def _ends_before(self, places: IntArray) -> IntArray:
        """Documents of the stream that have ended after so many tokens, for each of `places`."""
        epochs, within = np.divmod(places, self._num_tokens)
        ended = epochs * self._num_documents
        for number in np.unique(epochs):
            here = epochs == number
            starts = self._epoch(int(number)).starts
            ended[here] += np.searchsorted(starts, within[here], "right") - 1
        return ended
