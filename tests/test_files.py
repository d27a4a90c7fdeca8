"""The one door for files: hostile text, YAML 1.2 meaning, errors that name the key, and safe writing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator, model_validator

from meshwright import files
from meshwright.errors import InputError
from meshwright.files import (
    MAX_DEPTH,
    MAX_FILE_BYTES,
    Noun,
    apply_overrides,
    choice,
    decode,
    json_schema,
    parse_yaml,
    read_text,
    read_yaml,
    to_yaml,
    write_text,
)
from meshwright.units import Bytes, Count
from meshwright.workload import Workload

# ---- text


@pytest.fixture(params=["libyaml", "pure Python"])
def _both_parsers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on the C parser and on the Python one, which serves where libyaml is missing."""
    if request.param == "libyaml":
        return

    class PureLoader(yaml.SafeLoader):
        yaml_implicit_resolvers = files._CoreSchemaLoader.yaml_implicit_resolvers
        yaml_constructors = files._CoreSchemaLoader.yaml_constructors

    monkeypatch.setattr(files, "_Loader", yaml.SafeLoader)
    monkeypatch.setattr(files, "_CoreSchemaLoader", PureLoader)


both_parsers = pytest.mark.usefixtures("_both_parsers")

MEANINGS = [
    ("30e9", 30e9),
    ("1e3", 1000.0),
    ("1.5", 1.5),
    (".5", 0.5),
    ("5.", 5.0),
    ("-0.25e-2", -0.0025),
    ("010", 10),  # 8 in YAML 1.1
    ("+12", 12),
    ("1_000", "1_000"),  # 1000 in YAML 1.1
    ("1:30", "1:30"),  # 90 in YAML 1.1
    ("0x10", "0x10"),
    ("on", "on"),  # a boolean in YAML 1.1, like the next three
    ("off", "off"),
    ("yes", "yes"),
    ("NO", "NO"),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("2026-11-22", "2026-11-22"),  # a date in YAML 1.1
    ("<<", "<<"),  # a merge in YAML 1.1
    ("=", "="),
    ("64 GB", "64 GB"),
    ("60%", "60%"),
    ("'30'", "30"),
    ('"true"', "true"),
    ("[1, 2.5, a]", [1, 2.5, "a"]),
    ("{tp: 1, pp: 4}", {"tp": 1, "pp": 4}),
    ("1２", "1２"),  # a digit of another script makes it a word
]


@both_parsers
@pytest.mark.parametrize(("text", "value"), MEANINGS)
def test_a_value_means_what_yaml_1_2_says(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}")["key"]
    assert read == value
    assert type(read) is type(value)


def test_infinities_are_read_so_that_a_field_can_refuse_them_by_name() -> None:
    read = parse_yaml("a: .inf\nb: -.INF\nc: .nan\nd: 1e999")
    assert read["a"] == math.inf
    assert read["b"] == -math.inf
    assert math.isnan(read["c"])
    assert read["d"] == math.inf


def test_json_is_read_as_it_is() -> None:
    document = {"a": 1, "b": [1.5, True, None, "x\ty", "µ", "\x01"], "c": {"d": {}, "e": []}}
    for text in (json.dumps(document), json.dumps(document, indent="\t"), json.dumps(document, indent=2)):
        assert parse_yaml(text) == document


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]"
HOSTILE = {
    "anchor": ("a: &x 1", "anchors"),
    "bomb": (BOMB, "anchors"),
    "alias": ("a: *x", "anchors|undefined"),
    "python tag": ("a: !!python/object/apply:os.system ['true']", "tags"),
    "standard tag": ("a: !!str 1", "tags"),
    "own tag": ("a: !x 1", "tags"),
    "bare tag": ("a: ! 1", "tags"),
    "tag on the document": ("!!map\na: 1", "tags"),
    "tag on a key": ("!!str a: 1", "tags"),
    "deep lists": ("a: " + "[" * 100_000, "levels of nesting"),
    "deep mappings": ("{a: " * 100_000, "levels of nesting"),
    "deep blocks": ("\n".join(" " * depth + "a:" for depth in range(200)), "levels of nesting"),
    "duplicate key": ("a: 1\nb: 2\na: 3", "stands twice"),
    "duplicate inner key": ("x: {a: 1, a: 1}", "stands twice"),
    "duplicate by quoting": ("a: 1\n'a': 2", "stands twice"),
    "endless integer": ("a: " + "9" * 5000, "at most 60 digits"),
    "endless float": ("a: 0." + "9" * 5000, "at most 60 digits"),
    "number as key": ("1: a", "a key is text"),
    "boolean as key": ("true: a", "a key is text"),
    "null as key": ("~: a", "a key is text"),
    "list as key": ("? [a, b]\n: c", "a key is text"),
    "many nodes": ("a: [" + "1," * 200_000 + "]", "at most 100,000 nodes"),
    "tab indent": ("a:\n\tb: 1", "YAML or JSON"),
    "NUL": ("a: \x00", "YAML or JSON"),
    "control character": ("a: \x07", "YAML or JSON"),
    "half a character": ("a: \ud800", "Unicode|YAML or JSON"),
    "two documents": ("a: 1\n---\nb: 2", "YAML or JSON"),
    "unclosed": ("a: [1, 2", "YAML or JSON"),
    "mapping in a value": ("a: b: c", "YAML or JSON"),
    "empty": ("", "a mapping of keys"),
    "only a comment": ("# nothing", "a mapping of keys"),
    "a list": ("- a\n- b", "a mapping of keys"),
    "a word": ("hello", "a mapping of keys"),
    "a number": ("42", "a mapping of keys"),
}


@both_parsers
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_refused_in_words(text: str) -> None:
    text, rule = HOSTILE[text]
    start = time.perf_counter()
    with pytest.raises(InputError, match=rule) as caught:
        parse_yaml(text, "deployment.yaml")
    assert time.perf_counter() - start < 8
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_hostile_key_cannot_fill_or_garble_the_screen() -> None:
    key = "\\e[2J" + "k" * 900
    text = f'"{key}": 1\n"{key}": 2'
    with pytest.raises(InputError, match="stands twice") as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    with pytest.raises(InputError, match="unknown key") as caught:
        decode(Workload, {"global_batch_size": 1, "sequence_length": 1, "\x1b[2J" + "k" * 10**6: 1})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_the_line_of_a_mistake_is_named() -> None:
    with pytest.raises(InputError, match="line 3"):
        parse_yaml("a: 1\nb: 2\nc: x: y\nd: 4")
    with pytest.raises(InputError, match="line 2"):
        parse_yaml("a: 1\nb: &x 2")
    with pytest.raises(InputError, match=r"plan.yaml line 3: 'a': the key stands twice"):
        parse_yaml("a: 1\nb: 2\na: 3", "plan.yaml")
    with pytest.raises(InputError, match=r"plan.yaml line 2: .*at most 60 digits"):
        parse_yaml("a: 1\nb: " + "9" * 61, "plan.yaml")


def test_depth_up_to_the_limit_is_read() -> None:
    text = "{a: " * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    assert parse_yaml(text)
    with pytest.raises(InputError, match="levels"):
        parse_yaml("{a: " + text + "}")


@given(st.text(max_size=200) | st.text(alphabet="ab: -[]{}#&*!|>'\"%@\n\t0.e~<=?,", max_size=60))
@settings(max_examples=800, deadline=None)
def test_any_text_gives_a_mapping_or_an_input_error(text: str) -> None:
    message = ""
    try:
        assert all(isinstance(key, str) for key in parse_yaml(text))
    except InputError as error:
        message = str(error)
    assert message.isprintable()


@given(data=st.binary(max_size=120))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_a_mapping_or_an_input_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        assert isinstance(read_yaml(path), dict)


# ---- files


def test_reads_a_file_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for number, head in enumerate((b"", b"\xef\xbb\xbf")):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(head + "a: µ\r\nb: 2\r\n".encode())
        assert read_yaml(path) == {"a": "µ", "b": 2}


def test_a_missing_file_is_met_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "deployment.yaml").write_text("a: 1")
    with pytest.raises(InputError, match="No such file") as caught:
        read_text(tmp_path / "deploymnt.yaml")
    assert caught.value.nearest == (str(tmp_path / "deployment.yaml"),)


def test_a_directory_is_met_with_the_files_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(InputError, match="a directory") as caught:
        read_text(tmp_path)
    assert caught.value.nearest == (str(tmp_path / "a.yaml"),)


def test_the_size_cap_holds_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_bytes(b"#" * MAX_FILE_BYTES)
    assert len(read_text(path)) == MAX_FILE_BYTES
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(InputError, match="at most 1,000,000 bytes"):
        read_text(path)
    path.write_bytes(b"#" * 2_000_000)
    with pytest.raises(InputError, match="at most 1,000,000 bytes"):
        read_yaml(path)
    assert len(read_text(path, max_bytes=3_000_000)) == 2_000_000


def test_a_file_that_is_not_utf_8_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InputError, match=r"byte 3 is 0xe9.*UTF-8"):
        read_text(path)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    refused: list[str] = []

    def read() -> None:
        with contextlib.suppress(InputError):
            read_text(path)
        refused.append("at once")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(5)
    assert refused
    with pytest.raises(InputError, match="pipe or device"):
        read_text(path)


@pytest.mark.parametrize(
    "path", ["", "a\0b", "no\0such/file", "x" * 5000, "/dev/null", "/dev/zero", "/no/such/place", "a/" * 3000]
)
def test_odd_paths_are_refused_in_words(path: str) -> None:
    with pytest.raises(InputError) as caught:
        read_text(path)
    assert caught.value.rule in ("the file cannot be read", "a file is needed")


def test_a_link_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        read_text(path)


# ---- decoding


class Inner(Noun):
    memory: Bytes
    kind: Literal["nvlink", "ib", 8] = "ib"


class Ordered(Noun):
    low: Count
    high: Count

    @model_validator(mode="after")
    def _in_order(self) -> Ordered:
        if self.low > self.high:
            raise InputError("low", self.low, "low is at most high", [self.high])
        return self


class Flat(Noun):
    flat: Count


def _read_range(value: object) -> object:
    return choice(value, {"low": Ordered, "high": Ordered, "flat": Flat}, "a word")


class Outer(Noun):
    nodes: Count
    inner: Inner | None = None
    parts: tuple[Inner, ...] = ()
    named: dict[str, Inner] | None = None
    span: Annotated[str | Ordered | Flat, BeforeValidator(_read_range)] = "none"
    order: Ordered | None = None


WRONG = [
    ({"nodes": 1.5}, "nodes", "whole number", (1, 2)),
    ({}, "nodes", "the key is needed", ()),
    ({"node": 4}, "node", "unknown key; also wrong: nodes", ("nodes", "order")),
    ({"nodes": 4, "zzz": 1}, "zzz", "unknown key", ("nodes", "inner", "parts", "named", "span", "order")),
    ({"nodes": 4, "inner": {"memory": "64"}}, "inner.memory", "needs a unit", ("64 GB", "64 TB", "64 Gb")),
    ({"nodes": 4, "inner": {"memroy": "64 GB"}}, "inner.memroy", "unknown key", ("memory",)),
    ({"nodes": 4, "inner": 3}, "inner", "a mapping", ("memory", "kind")),
    ({"nodes": 4, "inner": {"memory": "1 GB", "kind": "nvlin"}}, "inner.kind", "not one", ("nvlink", "ib")),
    ({"nodes": 4, "inner": {"memory": "1 GB", "kind": 9}}, "inner.kind", "not one of", ("nvlink", "ib", "8")),
    ({"nodes": 4, "parts": [{"memory": "1 GB"}, {"memory": "2 Gg"}]}, "parts[1].memory", "no unit", None),
    ({"nodes": 4, "parts": [{"memory": "1 GB", "kin": "ib"}]}, "parts[0].kin", "unknown key", ("kind",)),
    ({"nodes": 4, "parts": {"memory": "1 GB"}}, "parts", "valid tuple", None),
    ({"nodes": 4, "named": {"a": {"memory": 1}}}, "named.a.memory", "needs a unit", None),
    ({"nodes": 4, "named": {"a\nb": {"memory": 1}}}, "named.'a\\nb'.memory", "needs a unit", None),
    ({"nodes": 4, "order": {"low": 3, "high": 2}}, "order.low", "at most high", (2,)),
    ({"nodes": 4, "span": {"low": 3, "high": 2}}, "span.low", "at most high", (2,)),
    ({"nodes": 4, "span": {"low": 3}}, "span.high", "the key is needed", ()),
    ({"nodes": 4, "span": {"low": 3, "hihg": 2}}, "span.hihg", "unknown key", ("high",)),
    ({"nodes": 4, "span": {"flat": 0}}, "span.flat", "between 1 and", (1,)),
    ({"nodes": 4, "span": {"other": 1}}, "span", "either a word or a mapping", None),
    ([1], "file", "a mapping of keys", None),
    (None, "file", "a mapping of keys", None),
]  # fmt: skip


@pytest.mark.parametrize(("document", "key", "rule", "nearest"), WRONG)
def test_a_mistake_is_named_with_its_path_and_what_would_be_right(
    document: Any, key: str, rule: str, nearest: tuple[object, ...] | None
) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        decode(Outer, document)
    assert caught.value.key == key
    if nearest is not None:
        assert caught.value.nearest[: len(nearest)] == nearest


def test_a_path_goes_on_below_the_key_it_starts_from() -> None:
    with pytest.raises(InputError) as caught:
        decode(Outer, {"nodes": 4, "span": {"low": 3, "high": 2}}, "deployment")
    assert caught.value.key == "deployment.span.low"
    with pytest.raises(InputError) as caught:
        decode(Ordered, {"low": 3, "high": 2})
    assert caught.value.key == "low"


def test_a_validator_that_builds_a_noun_keeps_its_path() -> None:
    class Builder(Noun):
        part: Annotated[Outer, BeforeValidator(lambda value: Outer.model_validate(value))]

    with pytest.raises(InputError, match="unknown key") as caught:
        decode(Builder, {"part": {"nodes": 1, "order": {"low": 1, "hgh": 2}}})
    assert caught.value.key == "part.order.hgh"
    assert caught.value.nearest == ("high",)


def test_the_workload_s_forms_name_the_form_that_was_meant() -> None:
    base = {"global_batch_size": 8, "sequence_length": 4096}
    for change, key in [
        ({"sequence_length": {"min": 10, "max": 5}}, "sequence_length.min"),
        ({"sequence_length": {"min": 10, "mx": 5}}, "sequence_length.mx"),
        ({"sequence_length": {"mean": 5}}, "sequence_length"),
        ({"sequence_length": "long"}, "sequence_length"),
        ({"routing": {"zipf": "much"}}, "routing.zipf"),
        ({"routing": {"zipff": 1}}, "routing"),
        ({"routing": "balancd"}, "routing"),
        ({"precision": "fp15"}, "precision"),
    ]:
        with pytest.raises(InputError) as caught:
            decode(Workload, {**base, **change})
        assert caught.value.key == key


def test_every_mistake_is_listed_after_the_first() -> None:
    with pytest.raises(InputError) as caught:
        decode(Outer, {"nodes": 0, "inner": {"memory": 1}, "order": {"low": 1}})
    assert caught.value.key == "nodes"
    assert "also wrong: inner.memory, order.high" in caught.value.rule


def test_decoding_keeps_what_is_right() -> None:
    read = decode(Outer, {"nodes": 30e3, "parts": [{"memory": "1 GiB", "kind": 8}], "span": "none"})
    assert (read.nodes, read.parts[0].memory, read.parts[0].kind) == (30_000, 2**30, 8)
    with pytest.raises(Exception, match="frozen"):
        read.nodes = 1


# ---- overrides


DOCUMENT = {
    "layout": {"tp": 1},
    "cluster": {"links": [{"name": "a"}, {"name": "b"}]},
    "model": "small",
    "none": None,
}


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("layout.tp=4", ("layout", "tp"), 4),
        ("layout.ep=16", ("layout", "ep"), 16),
        ("policy.engine=native", ("policy", "engine"), "native"),
        ("a.b.c=30e9", ("a", "b", "c"), 30e9),
        ("none.x=1", ("none", "x"), 1),
        ("cluster.links[1].name=c", ("cluster", "links", 1, "name"), "c"),
        ("cluster.links[0].bandwidth=100 GB/s", ("cluster", "links", 0, "bandwidth"), "100 GB/s"),
        ("cluster.links[1]={name: z}", ("cluster", "links", 1), {"name": "z"}),
        ("model={num_experts: 8}", ("model",), {"num_experts": 8}),
        ("layout=", ("layout",), None),
        ("layout.tp==", ("layout", "tp"), "="),
        (" layout.tp = 4 ", ("layout", "tp"), 4),
        ("name=on", ("name",), "on"),
    ],
)
def test_an_override_sets_one_value(override: str, where: tuple[Any, ...], value: object) -> None:
    before = json.dumps(DOCUMENT)
    place: Any = apply_overrides(DOCUMENT, [override])
    for step in where:
        place = place[step]
    assert place == value
    assert json.dumps(DOCUMENT) == before  # the given document is left alone


def test_overrides_apply_in_order() -> None:
    changed = apply_overrides({}, ["a.b=1", "a.c=2", "a.b=3"])
    assert changed == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize(
    "override",
    ["", "=", "=4", "layout.tp", "layout..tp=1", ".layout=1", "layout.=1", "layout.tp.x=1", "model.layers=1",
     "cluster.links.name=1", "cluster.links[2].name=1", "cluster.links[x].name=1", "cluster.links[-1].name=1",
     "layout[0]=1", "[0]=1", "a[0]=1", "cluster.links[0=1", "layout.tp=[1", "layout.tp=&x 1",
     "layout.tp=!!int 1", "a.b=1\nc: 2", "a.b=1\nvalue: 3", "a=\ud800"],
)  # fmt: skip
def test_a_wrong_override_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        apply_overrides(DOCUMENT, [override])


# ---- writing


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**50), 10**50)
    | st.floats(allow_nan=False)
    | st.text(max_size=30)
    | st.sampled_from(
        [text for text, _ in MEANINGS] + ["09", "1e5", "30e9", "0o7", "-", "- a", "a: b", "# c", "."]
    )
)
documents = st.dictionaries(
    st.text(max_size=12) | st.sampled_from(["on", "1", "1e5", "null", "<<", "", "a.b"]),
    scalars
    | st.lists(scalars, max_size=3)
    | st.dictionaries(st.text(max_size=5), st.lists(scalars, max_size=2)),
    max_size=4,
)


@given(documents)
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_back_equal(document: dict[str, Any]) -> None:
    text = to_yaml(document)
    assert parse_yaml(text) == document
    assert list(parse_yaml(text)) == list(document)


def test_a_value_that_stands_twice_is_written_twice() -> None:
    shared = {"value": [1, 2]}
    document = {"a": shared, "b": shared, "c": [shared, shared]}
    assert "*" not in to_yaml(document)
    assert parse_yaml(to_yaml(document)) == document


def test_words_that_look_like_numbers_stay_words() -> None:
    document = {"a": "30e9", "b": "09", "c": "1e5", "d": "on", "e": "64 GB", "f": "1:30", "g": ""}
    assert parse_yaml(to_yaml(document)) == document
    assert "64 GB" in to_yaml(document)  # without quotes


def test_a_file_is_written_whole_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    write_text(path, "a: µ\n")
    assert path.read_bytes() == "a: µ\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    write_text(path, "a: 2\n")
    assert path.read_text() == "a: 2\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["plan.yaml"]


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize(("failure", "raised"), [(_full_disk, InputError), (_interrupt, KeyboardInterrupt)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: Any, raised: type[BaseException]
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")
    monkeypatch.setattr(files.os, step, failure)
    with pytest.raises(raised):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.yaml"]


def test_text_that_has_no_bytes_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("old")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(path, "half \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.yaml"]


def test_a_link_keeps_pointing_at_the_file_that_was_written(tmp_path: Path) -> None:
    target, link = tmp_path / "target.yaml", tmp_path / "link.yaml"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    # A pipe stands for every device: were the guard to break, a real device would be lost to the machine.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "through")
    reader.join(5)
    assert read == ["through"]
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


@pytest.mark.parametrize("path", ["", "/no/such/folder/plan.yaml", "a\0b", "/proc/plan.yaml", "x" * 5000])
def test_a_path_that_cannot_be_written_is_refused_in_words(path: str) -> None:
    with pytest.raises(InputError):
        write_text(path, "a: 1")


def test_a_directory_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a directory"):
        write_text(tmp_path, "a: 1")


# ---- schema


def test_the_schema_is_a_schema_and_accepts_what_the_reader_accepts() -> None:
    schema = json_schema(Outer)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"nodes": 4, "inner": {"memory": "64 GB"}})
    assert validator.is_valid({"nodes": 30e9})
    assert not validator.is_valid({"nodes": 1.5})
    assert not validator.is_valid({"nodes": 0})
    assert not validator.is_valid({"nodes": 4, "inner": {"memory": 64}})
    assert not validator.is_valid({"nodes": 4, "zzz": 1})


def test_the_recursion_limit_is_never_met() -> None:
    text = "a: " + "{a: " * (MAX_DEPTH - 2) + "1" + "}" * (MAX_DEPTH - 2)
    document = parse_yaml(text)
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(400)
        assert parse_yaml(to_yaml(document)) == document
    finally:
        sys.setrecursionlimit(limit)
