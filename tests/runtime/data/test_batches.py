"""What batches hold: every token once an epoch, the right targets, the same rows for any reader."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.deployment import Training
from meshwright.errors import InputError
from meshwright.runtime.data import IGNORED, Batch, DataStream
from meshwright.runtime.data.buckets import BucketedOrder, bucket_lengths
from meshwright.runtime.data.corpus import Corpus
from meshwright.runtime.data.packing import PackedOrder
from meshwright.runtime.data.shuffling import Purpose, permutation

MODES = ("packed", "bucketed")
PARTS = ("tokens", "targets", "positions", "documents")

few = settings(max_examples=50, deadline=None)
document_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=10)
batch_sizes = st.integers(1, 5)
seeds = st.integers(0, 3)


def a_stream(
    lengths: list[int], mode: str, batch_size: int, longest: int, seed: int = 0, shortest: int = 2
) -> DataStream:
    """A stream over documents of these lengths; a token's id is its place in the corpus, so it tells all."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    corpus = Corpus(np.arange(offsets[-1], dtype=np.uint32), offsets, "source", "tokenizer")
    training = Training(documents=mode, seed=seed)
    if mode == "packed":
        return DataStream(corpus, PackedOrder(offsets, seed, batch_size, longest), training)
    order = BucketedOrder(offsets, seed, batch_size, min(shortest, longest), longest)
    return DataStream(corpus, order, training)


def pieces_of(batch: Batch) -> list[list[int]]:
    """Tokens of each row, without padding."""
    rows = zip(batch.tokens, batch.documents, strict=True)
    return [tokens[documents >= 0].tolist() for tokens, documents in rows]


def rows_of(stream: DataStream) -> Iterator[list[int]]:
    """Tokens of one row after another, without padding."""
    while True:
        yield from pieces_of(stream.next())


def equal(left: Batch, right: Batch) -> bool:
    same = all(torch.equal(getattr(left, part), getattr(right, part)) for part in PARTS)
    return same and left.num_targets == right.num_targets


@few
@given(document_lengths, batch_sizes, st.integers(1, 16), seeds)
def test_packed_uses_every_token_once_an_epoch(
    lengths: list[int], batch_size: int, longest: int, seed: int
) -> None:
    num_tokens = sum(lengths)
    rows = rows_of(a_stream(lengths, "packed", batch_size, longest, seed))
    used: Counter[int] = Counter()
    taken = 0
    for epoch in range(1, longest + 1):
        starting = -(-epoch * num_tokens // longest)  # sequences that start in the epochs so far
        for row in islice(rows, starting - taken):
            assert len(row) == longest
            used.update(row)
        taken = starting
        # The last of these sequences goes on into the next epoch, or through several short ones.
        overhang = starting * longest - epoch * num_tokens
        assert min(used[token] for token in range(num_tokens)) >= epoch
        assert max(used.values()) <= epoch - (-overhang // num_tokens)
    # So many epochs fill so many sequences to the last token: nothing is left over.
    assert used == dict.fromkeys(range(num_tokens), longest)


@few
@given(document_lengths, batch_sizes, st.integers(1, 16), st.integers(1, 16), seeds)
def test_bucketed_gives_each_piece_once_an_epoch_in_the_order_of_waiting(
    lengths: list[int], batch_size: int, shortest: int, longest: int, seed: int
) -> None:
    """Against the rule as it is said: pieces come in order, and a bucket that is full goes out."""
    shortest = min(shortest, longest)
    buckets = bucket_lengths(shortest, longest)
    pieces = []
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        tokens = list(range(start, start + length))
        pieces += [tokens[i : i + longest] for i in range(0, length, longest)]
    stream = a_stream(lengths, "bucketed", batch_size, longest, seed, shortest)
    waiting: dict[int, list[list[int]]] = defaultdict(list)
    for epoch in range(6):
        for number in permutation(len(pieces), seed, epoch, Purpose.DOCUMENTS):
            piece = pieces[number]
            bucket = next(bucket for bucket in buckets if bucket >= len(piece))
            waiting[bucket].append(piece)
            if len(waiting[bucket]) == batch_size:
                batch = stream.next()
                assert batch.tokens.shape == (batch_size, bucket)
                assert pieces_of(batch) == waiting.pop(bucket)


@few
@given(document_lengths, st.sampled_from(MODES), batch_sizes, st.integers(1, 16), seeds)
def test_targets_positions_and_documents(
    lengths: list[int], mode: str, batch_size: int, longest: int, seed: int
) -> None:
    ends = set(np.cumsum(lengths).tolist())
    stream = a_stream(lengths, mode, batch_size, longest, seed)
    for _ in range(4):
        batch = stream.next()
        num_targets = 0
        for row in range(batch_size):
            tokens, targets, positions, documents = (getattr(batch, part)[row].tolist() for part in PARTS)
            num_pieces = 0
            for i, (token, document) in enumerate(zip(tokens, documents, strict=True)):
                if document < 0:
                    assert (token, targets[i], positions[i]) == (0, IGNORED, 0)
                    assert set(documents[i:]) == {-1}
                    continue
                # A document's next token is the next number, in this row or in another.
                assert targets[i] == (IGNORED if token + 1 in ends else token + 1)
                num_targets += targets[i] != IGNORED
                if i == 0 or document != documents[i - 1]:
                    assert (document, positions[i]) == (num_pieces, 0)
                    num_pieces += 1
                else:
                    assert token == tokens[i - 1] + 1
                    assert token not in ends
                    assert positions[i] == positions[i - 1] + 1
        assert batch.num_targets == num_targets


@few
@given(document_lengths, st.sampled_from(MODES), batch_sizes, st.data())
def test_rows_are_the_same_for_any_reader(
    lengths: list[int], mode: str, batch_size: int, data: st.DataObject
) -> None:
    whole = a_stream(lengths, mode, batch_size, 8)
    cuts = sorted(data.draw(st.lists(st.integers(0, batch_size), max_size=3)))
    bounds = [0, *cuts, batch_size]
    rows = [range(first, last) for first, last in pairwise(bounds)]
    rows.append(range(0, batch_size, 2))
    readers = [a_stream(lengths, mode, batch_size, 8) for _ in rows]
    for _ in range(3):
        expected = whole.next()
        for reader, mine in zip(readers, rows, strict=True):
            batch = reader.next(mine)
            assert batch.num_targets == expected.num_targets
            for part in PARTS:
                assert torch.equal(getattr(batch, part), getattr(expected, part)[list(mine)])


@few
@given(document_lengths, st.sampled_from(MODES), batch_sizes, st.integers(0, 7), seeds)
def test_a_restored_stream_goes_on_as_if_never_stopped(
    lengths: list[int], mode: str, batch_size: int, steps: int, seed: int
) -> None:
    stream = a_stream(lengths, mode, batch_size, 8, seed)
    for _ in range(steps):
        stream.next(range(0))
    resumed = a_stream(lengths, mode, batch_size, 8, seed)
    resumed.restore(json.loads(json.dumps(stream.state())))
    for _ in range(3):
        assert equal(resumed.next(), stream.next())


def test_packed_goes_on_with_another_batch_size() -> None:
    stream, other = (a_stream([7, 30, 12], "packed", size, 8) for size in (6, 4))
    stream.next()
    other.restore(stream.state())
    assert list(islice(rows_of(other), 12)) == list(islice(rows_of(stream), 12))


def test_a_document_that_is_cut_predicts_across_the_cut() -> None:
    batch = a_stream([10], "bucketed", 3, 4).next()  # pieces of 4, 4 and 2 tokens: the last waits
    assert batch.tokens.shape[1] == 4
    last = {int(row[-1]): int(target[-1]) for row, target in zip(batch.tokens, batch.targets, strict=True)}
    assert last == {3: 4, 7: 8}


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_differ(mode: str) -> None:
    def start(seed: int, skipped: int = 0) -> list[list[int]]:
        rows = rows_of(a_stream([4] * 64, mode, 8, 4, seed))
        return list(islice(rows, skipped, skipped + 64))

    orders = [start(0), start(1), start(0, skipped=64), start(1, skipped=64)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_sequences_of_a_long_document_do_not_come_one_after_another() -> None:
    rows = list(islice(rows_of(a_stream([640], "packed", 8, 10)), 128))
    epochs = rows[:64], rows[64:]
    for epoch in epochs:
        assert sorted(epoch) == [list(range(first, first + 10)) for first in range(0, 640, 10)]
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]


def test_types_and_shapes() -> None:
    for mode in MODES:
        batch = a_stream([5, 9], mode, 4, 8).next(range(1, 3))
        for part in PARTS:
            tensor = getattr(batch, part)
            assert tensor.dtype == torch.int64
            assert tensor.shape == (2, batch.tokens.shape[1])
        assert type(batch.num_targets) is int


def test_a_reader_without_rows_gets_the_shape() -> None:
    for mode in MODES:
        batch = a_stream([5, 9], mode, 4, 8).next(range(2, 2))
        assert batch.tokens.shape[0] == 0
        assert batch.tokens.shape[1] in (2, 4, 8)
        assert batch.num_targets > 0


@pytest.mark.parametrize("rows", [range(5), range(-1, 2), range(3, -1, -1)])
def test_rows_outside_the_batch(rows: range) -> None:
    stream = a_stream([5, 9], "packed", 4, 8)
    before = stream.state()
    with pytest.raises(ValueError, match="rows of a global batch of 4"):
        stream.next(rows)
    assert stream.state() == before


def test_bucket_lengths() -> None:
    assert bucket_lengths(512, 4096) == (512, 1024, 2048, 4096)
    assert bucket_lengths(512, 3000) == (512, 1024, 2048, 3000)
    assert bucket_lengths(4096, 4096) == (4096,)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("seed", 1, "training.seed"),
        ("documents", "bucketed", "training.documents"),
        ("lengths", [16], "workload.sequence_length"),
        ("data", "0", "training.data"),
        ("tokenizer", "0", "training.tokenizer"),
        ("position", -1, "data.position"),
        ("position", None, "data.position"),
    ],
)
def test_a_state_of_another_stream_is_refused(name: str, value: object, key: str) -> None:
    stream = a_stream([5, 9], "packed", 4, 8)
    stream.next()
    before = stream.state()
    with pytest.raises(InputError) as caught:
        stream.restore({**before, name: value})
    assert caught.value.key == key
    assert stream.state() == before


def test_bucketed_refuses_another_batch_size() -> None:
    stream = a_stream([5, 9], "bucketed", 4, 8)
    with pytest.raises(InputError, match=r"workload\.global_batch_size: 3: .*nearest: 4"):
        a_stream([5, 9], "bucketed", 3, 8).restore(stream.state())
