"""Text to token ids: bytes as they are, or a trained tokenizer from its `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import InputError

KEY = "training.tokenizer"
BYTES = "bytes"

TokenArray = NDArray[np.uint16 | np.uint32]


class Tokenizer(Protocol):
    """Turns texts into ids below `vocab_size`. Equal digests give equal ids for equal texts."""

    digest: str
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Ids of all texts one after another [T], and how many each text has [len(texts)]."""
        ...


class ByteTokenizer:
    """A token is a byte of the UTF-8 text; nothing is added."""

    digest = BYTES
    vocab_size = 256

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Bytes of all texts one after another [T], and how many each text has [len(texts)]."""
        encoded = [text.encode("utf-8") for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint16), lengths


class FileTokenizer:
    """A tokenizer of the library `tokenizers`. It adds the special tokens that its file asks for."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self._path = path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(KEY, str(path), f"cannot be read: {error.strerror}", [BYTES]) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises no narrower class
            raise InputError(KEY, str(path), f"not a tokenizer.json: {str(error)[:200]}", [BYTES]) from None
        # A file may carry what served another use: here no text is cut and none is filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(content).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1  # ids may have gaps: the highest decides

    @property
    def _dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Ids of all texts one after another [T], and how many each text has [len(texts)].

        Raises InputError where the tokenizer has no token for a text.
        """
        try:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=True)
        except Exception as error:  # the library raises no narrower class
            raise InputError(KEY, str(self._path), f"a text has no tokens: {str(error)[:200]}") from None
        ids = [np.array(encoding.ids, self._dtype) for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.concatenate([np.zeros(0, self._dtype), *ids]), lengths


def _file(name: str, folder: Path) -> Path:
    path = folder / name
    try:
        path = path / "tokenizer.json" if path.is_dir() else path
        is_file = path.is_file()  # opening a pipe could wait for ever
    except OSError as error:
        raise InputError(KEY, name, f"cannot be read: {error.strerror}", [BYTES]) from None
    if not is_file:
        raise InputError(KEY, name, f"no such file in {folder}; a path of a tokenizer.json", [BYTES])
    return path


def open_tokenizer(name: str, folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer that `training.tokenizer` names: `bytes`, or the path of a `tokenizer.json`.

    The path is looked up from `folder`; a folder that holds a `tokenizer.json` stands for it. Raises
    InputError when it has more ids than a model with `vocab_size`.
    """
    tokenizer: Tokenizer = ByteTokenizer() if name == BYTES else FileTokenizer(_file(name, folder))
    if tokenizer.vocab_size > vocab_size:
        rule = (
            f"its ids go up to {tokenizer.vocab_size - 1:,}: a model needs vocab_size = "
            f"{tokenizer.vocab_size:,} or more, and model.vocab_size is {vocab_size:,}"
        )
        raise InputError(KEY, name, rule, [BYTES] if vocab_size >= ByteTokenizer.vocab_size else [])
    return tokenizer
