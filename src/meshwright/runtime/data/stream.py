"""The stream of batches that a run trains on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from meshwright.deployment import Training
from meshwright.errors import InputError
from meshwright.runtime.data import cache as cached
from meshwright.runtime.data.batch import Batch, Pieces, build_batch
from meshwright.runtime.data.buckets import BucketedOrder
from meshwright.runtime.data.corpus import Corpus, Progress, open_corpus
from meshwright.runtime.data.packing import PackedOrder
from meshwright.runtime.data.sources import open_source
from meshwright.runtime.data.tokenizer import open_tokenizer
from meshwright.workload import Workload

State = dict[str, int | str | list[int]]
"""Where a stream stands, ready for JSON."""


class Order(Protocol):
    """Which pieces of documents make up each batch. A position counts sequences handed out before it."""

    lengths: tuple[int, ...]
    batch_size: int

    def pick(self, position: int, rows: range) -> tuple[Pieces, int, int]:
        """Pieces of some rows of the batch at a position, its width, and targets in all of its rows."""
        ...


class DataStream:
    """Global batches without end; each reader builds the rows that it needs, and all see the same batches."""

    def __init__(self, corpus: Corpus, order: Order, training: Training) -> None:
        self.corpus = corpus
        self._order = order
        self._training = training
        self._position = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths that a batch's sequences may have, in tokens, rising."""
        return self._order.lengths

    def next(self, rows: range | None = None) -> Batch:
        """The next global batch; of its rows only those asked for (all when None).

        Every reader has to call it for every step, also one that asks for no rows. Raises ValueError for
        rows that a global batch does not have.
        """
        size = self._order.batch_size
        rows = range(size) if rows is None else rows
        if len(rows) and not (rows.step > 0 and rows[0] >= 0 and rows[-1] < size):
            raise ValueError(f"{rows}: rising rows of a global batch of {size} are needed")
        pieces, width, num_targets = self._order.pick(self._position, rows)
        batch = build_batch(self.corpus.tokens, pieces, len(rows), width, num_targets)
        self._position += size
        return batch

    def state(self) -> State:
        """Where the stream stands: how many sequences it gave, and what decides which they were."""
        return {
            "position": self._position,
            "data": self.corpus.source,
            "tokenizer": self.corpus.tokenizer,
            "seed": self._training.seed,
            "documents": self._training.documents,
            "lengths": list(self.lengths),
            "global_batch_size": self._order.batch_size,
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on where another stream stood, however many readers it had.

        Raises InputError, and stays where it is, when that stream would have given other sequences: for
        `packed` documents the batch size may differ, everything else must be the same.
        """
        keys = {
            "data": "training.data",
            "tokenizer": "training.tokenizer",
            "seed": "training.seed",
            "documents": "training.documents",
            "lengths": "workload.sequence_length",
            "global_batch_size": "workload.global_batch_size",
        }
        if self._training.documents == "packed":
            del keys["global_batch_size"]
        here = self.state()
        for name, key in keys.items():
            if state.get(name) != here[name]:
                raise self._differs(name, key, state.get(name))
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise InputError("data.position", position, "a checkpoint holds how many sequences were given")
        self._position = position

    def _differs(self, name: str, key: str, then: object) -> InputError:
        if name in ("data", "tokenizer"):
            value: object = getattr(self._training, name)
            return InputError(key, value, "not the content that the checkpoint's run read: start anew")
        value = list(self.lengths) if name == "lengths" else self.state()[name]
        return InputError(key, value, "not as in the checkpoint's run: keep its value or start anew", [then])


def open_stream(
    training: Training,
    workload: Workload,
    vocab_size: int,
    folder: Path,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> DataStream:
    """The batches of `workload.global_batch_size` sequences that `training` asks for, from the first.

    `training.data` and `training.tokenizer` are looked up from `folder`. Tokens are made once and kept in
    `cache`, by default `$XDG_CACHE_HOME/meshwright/data`; `progress(done, total)` is called in bytes of the
    source while they are made. Raises InputError for data or a tokenizer that cannot be used.
    """
    tokenizer = open_tokenizer(training.tokenizer, folder, vocab_size)
    source = open_source(training.data, folder)
    corpus = open_corpus(source, tokenizer, cache or cached.default_folder(), progress)
    size, longest = workload.global_batch_size, workload.max_sequence_length
    order: Order
    if training.documents == "packed":
        order = PackedOrder(corpus.offsets, training.seed, size, longest)
    else:
        order = BucketedOrder(corpus.offsets, training.seed, size, workload.min_sequence_length, longest)
    return DataStream(corpus, order, training)


def unigram_entropy(stream: DataStream) -> float:
    """Entropy of the corpus' distribution of tokens, in nats per token.

    It is the loss of the best model that knows no context; one that learned from context is below it.
    """
    return stream.corpus.unigram_entropy()
