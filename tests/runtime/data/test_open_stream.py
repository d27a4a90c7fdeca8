"""From files to a stream: formats, tokenizers, what is refused, and the cache."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from meshwright.deployment import Training
from meshwright.errors import InputError
from meshwright.runtime.data import DataStream, cache, open_stream, unigram_entropy
from meshwright.workload import Workload

TEXTS = ["To be, or not to be.\nThat is the question.", "Zwölf Boxkämpfer jagen Viktor.", "ab"]
WORKLOAD = Workload(global_batch_size=2, sequence_length=8)


def write_text(folder: Path) -> str:
    (folder / "corpus.txt").write_text("\n\n  \n".join(TEXTS) + "\n\n", "utf-8")
    return "corpus.txt"


def write_text_from_elsewhere(folder: Path) -> str:
    text = "\r\n\r\n".join(text.replace("\n", "\r\n") for text in TEXTS)
    (folder / "corpus").write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    return "corpus"


def write_json_lines(folder: Path, name: str = "corpus.jsonl") -> str:
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    (folder / name).write_text("\n".join(lines) + "\n\n", "utf-8")
    return name


def write_parquet(folder: Path) -> str:
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, folder / "corpus.parquet")
    return "corpus.parquet"


def write_dataset(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"id": [0, 1, 2], "text": TEXTS}).save_to_disk(folder / "saved", num_shards=2)
    return "saved"


def write_dataset_of_splits(folder: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train, test = (datasets.Dataset.from_dict({"text": texts}) for texts in (TEXTS, ["no", "not this"]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "saved")
    return "saved"


def write_folder(folder: Path) -> str:
    inner = folder / "texts" / "more"
    inner.mkdir(parents=True)
    (inner.parent / "a.txt").write_text("\n\n".join(TEXTS[:2]), "utf-8")
    (inner.parent / "README").write_text("not a part of it")
    (inner.parent / ".hidden.txt").write_text("nor this")
    (inner / "b.jsonl").write_text(json.dumps({"text": TEXTS[2]}), "utf-8")
    return "texts"


def opened(folder: Path, data: str | None, **keys: Any) -> DataStream:
    vocab_size = keys.pop("vocab_size", 256)
    progress = keys.pop("progress", None)
    store = keys.pop("cache", folder / "cache")
    return open_stream(Training(data=data, **keys), WORKLOAD, vocab_size, folder, store, progress)


def documents_of(stream: DataStream) -> list[list[int]]:
    bounds = stream.corpus.offsets.tolist()
    return [stream.corpus.tokens[a:b].tolist() for a, b in pairwise(bounds)]


AS_BYTES = [list(text.encode("utf-8")) for text in TEXTS]


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        write_text_from_elsewhere,
        write_json_lines,
        write_parquet,
        write_dataset,
        write_dataset_of_splits,
        write_folder,
    ],
)
def test_formats_hold_the_same_documents(write: Callable[[Path], str], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    stream = opened(tmp_path, write(tmp_path), progress=lambda done, total: calls.append((done, total)))
    assert documents_of(stream) == AS_BYTES
    done, total = calls[-1]
    assert done == total > 0
    stream.next()


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": "abc"}\n{"text": ""}\n')
    assert documents_of(opened(tmp_path, "c.jsonl")) == [list(b"abc")]


def test_progress_grows_over_large_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("\n\n".join(["word " * 20_000] * 30))
    calls: list[int] = []
    opened(tmp_path, "in", progress=lambda done, total: calls.append(done))
    assert len(calls) > 4
    assert calls == sorted(calls)


def test_without_data_python_brings_a_corpus(tmp_path: Path) -> None:
    stream = opened(tmp_path, None)
    text = bytes(stream.corpus.tokens.astype(np.uint8)).decode("utf-8")
    assert len(text) > 300_000
    assert text.count(" the ") > 1000
    assert len(stream.corpus.offsets) > 50
    assert 2 < unigram_entropy(stream) < 5


def test_unigram_entropy(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("aabb")
    assert unigram_entropy(opened(tmp_path, "c.txt")) == pytest.approx(math.log(2))
    (tmp_path / "c.txt").write_text("aaaa")
    assert unigram_entropy(opened(tmp_path, "c.txt")) == 0
    (tmp_path / "c.txt").write_text("aaab")
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert unigram_entropy(opened(tmp_path, "c.txt")) == pytest.approx(expected)


def write_tokenizer(path: Path, words: list[str], unknown: bool = True) -> tokenizers.Tokenizer:
    """Splits at white space; puts [B] before a text; carries the truncation and padding of another use."""
    ids = {word: i for i, word in enumerate(["[U]", "[B]", *words])}
    model = tokenizers.models.WordLevel(ids, unk_token="[U]" if unknown else "[none]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[B] $A", special_tokens=[("[B]", 1)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return tokenizer


def test_a_tokenizer_from_a_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json", ["be", "to", "or", "not"])
    (tmp_path / "c.txt").write_text("to be or not to be\n\nto live")
    for name in ("tokenizer.json", "."):
        stream = opened(tmp_path, "c.txt", tokenizer=name)
        assert documents_of(stream) == [[1, 3, 2, 4, 5, 3, 2], [1, 3, 0]]
        assert stream.corpus.tokens.dtype == np.uint16


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json", [f"w{i}" for i in range(70_000)])
    (tmp_path / "c.txt").write_text("w69999 w0")
    stream = opened(tmp_path, "c.txt", tokenizer="tokenizer.json", vocab_size=70_002)
    assert documents_of(stream) == [[1, 70_001, 2]]
    assert stream.corpus.tokens.dtype == np.uint32


def test_a_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json", [f"w{i}" for i in range(300)])
    with pytest.raises(InputError, match=r"training\.tokenizer: .*vocab_size = 302 .*is 256") as caught:
        opened(tmp_path, None, tokenizer="tokenizer.json")
    assert caught.value.nearest == ("bytes",)
    with pytest.raises(InputError, match=r"training\.tokenizer: 'bytes': .*vocab_size = 256 .*is 200"):
        opened(tmp_path, None, vocab_size=200)


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.tokenizer: 'byte': no such file .*nearest: bytes"):
        opened(tmp_path, None, tokenizer="byte")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(InputError, match=r"training\.tokenizer: .*not a tokenizer\.json"):
        opened(tmp_path, None, tokenizer="broken.json")
    write_tokenizer(tmp_path / "knows-little.json", ["be"], unknown=False)
    with pytest.raises(InputError, match=r"training\.tokenizer: .*no tokens"):
        opened(tmp_path, None, tokenizer="knows-little.json")


def put(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return write


def put_table(**columns: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        pq.write_table(pa.table(columns), folder / "c.parquet")
        return "c.parquet"

    return write


def put_folder(**files: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / "in").mkdir()
        for name, content in files.items():
            (folder / "in" / name.replace("__", ".")).write_text(content)
        return "in"

    return write


def put_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.txt")
    return "pipe.txt"


def put_splits(folder: Path) -> str:
    for name in ("dev", "test"):
        (folder / "in" / name).mkdir(parents=True)
    (folder / "in" / "dataset_dict.json").write_text('{"splits": ["dev", "test"]}')
    return "in"


GOOD = b'{"text": "abc"}\n'


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda folder: write_json_lines(folder) and "corpos.jsonl",
            r"no such file .*nearest: corpus\.jsonl",
        ),
        (lambda folder: "a\0b", "no such file"),
        (put("c.txt", b""), "empty"),
        (put("c.txt", b"\n \n\n"), "empty"),
        (put("c.txt", b"a\n\nb"), "two tokens"),
        (put("c.txt", b"one\n\n\ntwo\nthree \xff\n"), "line 5: 0xff is not UTF-8"),
        (put("c.jsonl", b""), "empty"),
        (put("c.jsonl", b'{"text": ""}'), "empty"),
        (put("c.jsonl", GOOD + b"\n" + b'{"text": "ab'), "line 3: not JSON"),
        (put("c.jsonl", GOOD + b'{"text": "\xff"}'), "line 2: not JSON: UnicodeDecodeError"),
        (put("c.jsonl", GOOD + b"[" * 100_000), "line 2: not JSON"),
        (put("c.jsonl", GOOD + b'["text"]'), "line 2: .* no mapping"),
        (put("c.jsonl", b'{"content": "abc", "id": 1}'), "line 1: no field `text` .*nearest: 'content'"),
        (put("c.jsonl", GOOD + b'{"text": null}'), "line 2: the field `text` is None, not text"),
        (put("c.jsonl", GOOD + b'{"text": "\\ud800"}'), "line 2: half a character"),
        (put("c.parquet", b"PAR1 but no more"), "not a Parquet file"),
        (put_table(content=["abc"]), "no column `text` .*nearest: 'content'"),
        (put_table(text=["abc", None]), "row 2: .* None, not text"),
        (put_table(text=[1, 2]), "row 1: .* 1, not text"),
        (put_folder(), "neither a saved dataset nor files"),
        (put_folder(README="abc"), "neither a saved dataset nor files"),
        (put_folder(state__json="{}"), "not a saved dataset"),
        (put_folder(dataset_dict__json="[]"), "not a saved dataset"),
        (put_splits, r"none of them `train`.*nearest: .*dev"),
        (put_pipe, "a pipe or device"),
    ],
)
def test_bad_data_is_refused_in_words(write: Callable[[Path], str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path, write(tmp_path))
    assert caught.value.key == "training.data"
    assert not list(tmp_path.glob("cache/*"))
    assert not list(tmp_path.glob("cache/.*"))


def test_a_dataset_without_a_column_of_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"content": ["abc"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"training\.data: .*no column `text` .*nearest: 'content'"):
        opened(tmp_path, "saved")


def count_calls(folder: Path, data: str, **keys: Any) -> int:
    """How often progress was told: not at all when the cache was used. The documents are as they should."""
    calls: list[int] = []
    stream = opened(folder, data, progress=lambda done, total: calls.append(done), **keys)
    assert documents_of(stream) == AS_BYTES
    return len(calls)


def test_the_cache_is_used_for_the_same_content_only(tmp_path: Path) -> None:
    name = write_json_lines(tmp_path)
    assert count_calls(tmp_path, name) > 0
    assert count_calls(tmp_path, name) == 0
    assert count_calls(tmp_path, write_json_lines(tmp_path, "moved.jsonl")) == 0
    assert count_calls(tmp_path, write_text(tmp_path)) > 0
    (tmp_path / name).write_text('{"text": "changed"}')
    assert documents_of(opened(tmp_path, name)) == [list(b"changed")]


def test_tokens_of_the_cache_are_mapped_not_read(tmp_path: Path) -> None:
    name = write_text(tmp_path)
    for _ in range(2):
        assert isinstance(opened(tmp_path, name).corpus.tokens.base, np.memmap)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_a_list(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, replace_by_a_list, Path.unlink])
@pytest.mark.parametrize("part", ["*.tokens.npy", "*.offsets.npy", "*.json"])
def test_a_damaged_cache_is_made_anew(damage: Callable[[Path], None], part: str, tmp_path: Path) -> None:
    name = write_text(tmp_path)
    count_calls(tmp_path, name)
    (path,) = (tmp_path / "cache").glob(part)
    damage(path)
    assert count_calls(tmp_path, name) > 0
    assert count_calls(tmp_path, name) == 0


def test_where_no_cache_can_be_written_tokens_stay_in_memory(tmp_path: Path) -> None:
    name = write_text(tmp_path)
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert count_calls(tmp_path, name, cache=tmp_path / "file" / "cache") > 0


def test_a_full_disk_leaves_tokens_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write_tokens", no_room)
    assert count_calls(tmp_path, write_text(tmp_path)) > 0
    assert list((tmp_path / "cache").iterdir()) == []


Chunk = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def chunk(*tokens: int) -> Chunk:
    return np.array(tokens, np.uint16), np.array([len(tokens)], np.int64)


def test_a_crash_leaves_nothing_behind(tmp_path: Path) -> None:
    def chunks() -> Iterator[Chunk]:
        yield chunk(1, 2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.store(tmp_path, "key", chunks())
    assert list(tmp_path.iterdir()) == []


def test_two_writers_at_once(tmp_path: Path) -> None:
    """One begins and ends while the other writes; readers see a whole corpus or none, at every moment."""

    def slow() -> Iterator[Chunk]:
        yield chunk(1, 2)
        assert cache.load(tmp_path, "key") is None
        cache.store(tmp_path, "key", [chunk(1, 2), chunk(3)])
        assert cache.load(tmp_path, "key") is not None
        yield chunk(3)

    cache.store(tmp_path, "key", slow())
    tokens, offsets = cache.load(tmp_path, "key") or pytest.fail("nothing was stored")
    assert tokens.tolist() == [1, 2, 3]
    assert offsets.tolist() == [0, 2, 3]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_default_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    opened(tmp_path, write_text(tmp_path), cache=None)
    assert len(list((tmp_path / "xdg" / "meshwright" / "data").iterdir())) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to pass over it
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "meshwright" / "data"


def test_a_stream_resumes_over_files(tmp_path: Path) -> None:
    name = write_text(tmp_path)
    stream = opened(tmp_path, name)
    stream.next()
    resumed = opened(tmp_path, name)
    resumed.restore(json.loads(json.dumps(stream.state())))
    for _ in range(3):
        assert resumed.next().tokens.tolist() == stream.next().tokens.tolist()
    (tmp_path / name).write_text("other words")
    with pytest.raises(InputError, match=rf"training\.data: '{name}': not the content"):
        opened(tmp_path, name).restore(stream.state())


def test_bucketed_takes_its_lengths_from_the_workload(tmp_path: Path) -> None:
    workload = Workload(global_batch_size=1, sequence_length={"min": 4, "max": 24})
    training = Training(data=write_text(tmp_path), documents="bucketed")
    stream = open_stream(training, workload, 256, tmp_path, tmp_path / "cache")
    assert stream.lengths == (4, 8, 16, 24)
    # In bytes: 42 = 24 + 18, 32 = 24 + 8, and 2.
    assert sorted(stream.next().tokens.shape[1] for _ in range(5)) == [4, 8, 24, 24, 24]
