"""A corpus: the tokens of all documents, flat, and where each document starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InputError
from meshwright.runtime.data import cache
from meshwright.runtime.data.formats import KEY
from meshwright.runtime.data.sources import Source
from meshwright.runtime.data.tokenizer import TokenArray, Tokenizer

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)` while text is tokenised, in bytes of the source."""

_FORMAT = 1  # of what is stored: raise it when a change makes other tokens of the same text
_CHARACTERS_AT_ONCE = 2**20
_TOKENS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens. Every document has at least one token, and one of them at least two.

    `tokens` [T] are ids; document i is `tokens[offsets[i] : offsets[i + 1]]`, so `offsets` is [D + 1].
    `source` and `tokenizer` are digests of what they were made from.
    """

    tokens: TokenArray
    offsets: NDArray[np.int64]
    source: str
    tokenizer: str

    def unigram_entropy(self) -> float:
        """Entropy of the distribution of tokens, −Σ p ln p, in nats per token."""
        counts = np.zeros(0, np.int64)
        for first in range(0, len(self.tokens), _TOKENS_AT_ONCE):
            more = np.bincount(self.tokens[first : first + _TOKENS_AT_ONCE], minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        fractions = counts[counts > 0] / len(self.tokens)
        return max(0.0, -float(np.sum(fractions * np.log(fractions))))  # one token only: 0, not -0


def open_corpus(
    source: Source, tokenizer: Tokenizer, folder: Path | None, progress: Progress | None = None
) -> Corpus:
    """The source as tokens: from the cache in `folder`, or made and stored there.

    Where the folder is None or cannot be written to, the tokens stay in memory. Raises InputError when the
    source cannot be read, or holds nothing to predict.
    """
    key = hashlib.sha256(f"{_FORMAT} {source.digest} {tokenizer.digest}".encode()).hexdigest()[:32]
    arrays = None
    if folder is not None:
        arrays = cache.load(folder, key) or _stored(source, tokenizer, folder, key, progress)
    if arrays is None:
        chunks = list(_encoded(source, tokenizer, progress))
        tokens = np.concatenate([tokens for tokens, _ in chunks])
        arrays = tokens, cache.offsets_of(lengths for _, lengths in chunks)
    return Corpus(*arrays, source.digest, tokenizer.digest)


def _stored(
    source: Source, tokenizer: Tokenizer, folder: Path, key: str, progress: Progress | None
) -> cache.Arrays | None:
    try:
        cache.store(folder, key, _encoded(source, tokenizer, progress))
    except OSError:  # no right to write, or no room: the source's own are InputErrors by now
        return None
    return cache.load(folder, key)


def _encoded(
    source: Source, tokenizer: Tokenizer, progress: Progress | None
) -> Iterator[tuple[TokenArray, NDArray[np.int64]]]:
    """Tokens of some documents at a time, and their lengths; documents without a token are left out."""
    longest = 0
    for texts, done in _groups(source):
        tokens, lengths = tokenizer.encode(texts)
        lengths = lengths[lengths > 0]
        longest = max(longest, int(lengths.max(initial=0)))
        yield tokens, lengths
        if progress is not None:
            progress(done, source.num_bytes)
    if longest < 2:
        rule = "a document has at least two tokens, or there is nothing to predict"
        raise InputError(KEY, source.name, "empty: " + rule if longest == 0 else rule)


def _groups(source: Source) -> Iterator[tuple[list[str], int]]:
    """Documents in groups that are worth a call, with the source's bytes read so far."""
    texts: list[str] = []
    size = 0
    for text, done in source.documents():
        texts.append(text)
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE:
            yield texts, done
            texts, size = [], 0
    yield texts, source.num_bytes
