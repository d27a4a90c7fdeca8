"""Reading and writing the files of a deployment: bounded, safe, and exact about what is wrong.

One YAML dialect: the core schema of YAML 1.2 (so `30e9` is a number and `on` is a word), no anchors, no
tags, no duplicate keys, bounded size and depth. JSON is a subset of it and is read by the same door.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from meshwright.decoding import Noun, choice, decode, json_schema, key_in_words
from meshwright.errors import InputError, shown

__all__ = [
    "Noun",
    "apply_overrides",
    "choice",
    "decode",
    "json_schema",
    "parse_yaml",
    "read_text",
    "read_yaml",
    "to_yaml",
    "write_text",
]

MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 100_000
_MAX_DIGITS = 60
_LONG_LINE = 1000

_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(yaml.SafeDumper):
    """Writes nothing that the loader refuses (no aliases), and quotes what it would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if text.isprintable() else '"'  # the plain style loses some line ends
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


class _CoreSchemaLoader(_Loader):  # type: ignore[misc]  # the base depends on whether libyaml is there
    """Safe YAML with the YAML 1.2 core schema and without duplicate keys."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in (
        ("tag:yaml.org,2002:bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", "tTfF"),
        ("tag:yaml.org,2002:null", r"(?:~|null|Null|NULL|)\Z", "~nN"),
        ("tag:yaml.org,2002:int", r"[-+]?\d+\Z", "-+0123456789"),
        (
            "tag:yaml.org,2002:float",
            rf"(?:{number}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z",
            "-+.0123456789",
        ),
    ):
        for letter in [*first, ""] if "null" in tag else first:
            table.setdefault(letter, []).append((tag, re.compile(pattern, re.ASCII)))
    return table


def _construct_int(loader: Any, node: yaml.ScalarNode) -> int:
    if len(node.value) > _MAX_DIGITS:
        raise InputError(_where(node), node.value, f"a number has at most {_MAX_DIGITS} digits")
    return int(node.value)


def _construct_float(loader: Any, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    if len(text) > _MAX_DIGITS:
        raise InputError(_where(node), node.value, f"a number has at most {_MAX_DIGITS} digits")
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_mapping(loader: Any, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise InputError(_where(key_node), key, "a key is text")
        if key in seen:
            raise InputError(_where(key_node), key, "the key stands twice in one mapping; keep one")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


def _where(node: yaml.Node | yaml.Event) -> str:
    return f"line {node.start_mark.line + 1}" if node.start_mark else "the file"


_CoreSchemaLoader.yaml_implicit_resolvers = _resolvers()
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.yaml_implicit_resolvers = {
    letter: yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []) + _resolvers().get(letter, [])
    for letter in {*yaml.SafeDumper.yaml_implicit_resolvers, *_resolvers()}
}


def read_text(path: str | Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The UTF-8 text of a file of at most `max_bytes`. Raises InputError when it is not that."""
    name = str(path)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            near = [str(file) for file in sorted(Path(path).glob("*.yaml"))[:3]]
            raise InputError(name, "a directory", "a file is needed", near)
        if not stat.S_ISREG(mode):  # opening a pipe could wait for ever
            raise InputError(name, "a pipe or device", "a file is needed")
        with open(path, "rb") as stream:
            data = stream.read(max_bytes + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(name, reason, "the file cannot be read", _files_like(Path(name))) from error
    if len(data) > max_bytes:
        raise InputError(name, f"over {max_bytes:,} bytes", f"a file has at most {max_bytes:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            name, f"byte {error.start} is 0x{data[error.start]:02x}", "the file must be UTF-8"
        ) from None


def _files_like(path: Path) -> list[str]:
    try:
        names = [p.name for p in path.parent.iterdir() if p.is_file()]
    except (OSError, ValueError):
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]


def parse_yaml(text: str, name: str = "input") -> dict[str, Any]:
    """The mapping that YAML (or JSON) text holds. Raises InputError for anything hostile or malformed."""
    try:
        _check_shape(text, name)
        document = yaml.load(text, Loader=_CoreSchemaLoader)
    except InputError as error:
        if error.key == name:
            raise
        raise InputError(f"{name} {error.key}", error.value, error.rule) from None
    except yaml.YAMLError as error:
        raise InputError(name, _yaml_problem(error), "the text must be YAML or JSON") from None
    except UnicodeError:
        raise InputError(name, "half a character", "the text must be Unicode") from None
    if not isinstance(document, dict):
        raise InputError(name, document, "the file must hold a mapping of keys to values")
    return document


def _check_shape(text: str, name: str) -> None:
    """One pass over the events, before anything is built: depth, size, no anchors, no tags."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if count > MAX_NODES:
            raise InputError(name, f"over {MAX_NODES:,} nodes", f"a file has at most {MAX_NODES:,} nodes")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise InputError(name, _where(event), "anchors and aliases are not taken; write the value out")
        if getattr(event, "tag", None):
            raise InputError(name, f"{getattr(event, 'tag', '')} in {_where(event)}", "tags are not taken")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise InputError(name, f"over {MAX_DEPTH} levels", f"at most {MAX_DEPTH} levels of nesting")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    return f"line {mark.line + 1}: {problem}" if mark is not None else str(problem)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    return parse_yaml(read_text(path), str(path))


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The document with `--set layout.tp=4` style overrides applied; values are read as YAML."""
    changed = json.loads(json.dumps(document, allow_nan=True))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise InputError("--set", override, "an override is written key.path=value", ["layout.tp=4"])
        read = parse_yaml(f"value: {text}", f"--set {key_in_words(path)}")
        if len(read) > 1:
            raise InputError("--set", override, "an override sets one value", ["layout.tp=4"])
        _set(changed, path.strip(), read["value"])
    return dict(changed)


def _set(document: dict[str, Any], path: str, value: object) -> None:
    """Put a value at `key.key[0].key`; mappings that are missing on the way are made."""
    steps = [int(index) if index else word for word, index in re.findall(r"([^.\[\]]+)|\[(\d{1,6})\]", path)]
    written = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    if not steps or written.removeprefix(".") != path:
        raise InputError("--set", path, "a path is keys with dots, and [0] for a list", ["layout.tp"])
    place: Any = {"": document}
    last: int | str = ""
    for step in steps:
        if place[last] is None and isinstance(step, str):
            place[last] = {}
        place = place[last]
        if isinstance(step, str):
            if isinstance(place, list):
                near = re.sub(r"\.(\d+)(?![^.\[])", r"[\1]", path)
                rule = f"{last!r} holds a list: an item of it is written {last}[0]"
                raise InputError("--set", path, rule, [near] if near != path else [])
            if not isinstance(place, dict):
                raise InputError("--set", path, f"{last!r} holds {shown(place)}, not a mapping")
            place.setdefault(step, None)
        elif not isinstance(place, list) or step >= len(place):
            raise InputError("--set", path, f"{last!r} holds {shown(place)}: nothing at [{step}]")
        last = step
    place[last] = value


def to_yaml(document: Mapping[str, Any], rows_in_lines: bool = False) -> str:
    """YAML text that `parse_yaml` reads back to an equal mapping; keys keep their order. `rows_in_lines` puts
    each mapping that holds no other one into a line."""
    style = None if rows_in_lines else False
    width = _LONG_LINE if rows_in_lines else 110
    text = yaml.dump(
        dict(document),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=width,
        default_flow_style=style,
    )
    return str(text)


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: a temporary neighbour, then one rename.

    What a link points to is written; a device or pipe (`/dev/stdout`) is written to, never replaced.
    """
    try:
        target = Path(os.path.realpath(path))
        data = text.encode("utf-8")
        if target.is_dir():
            raise InputError(str(path), "a directory", "a file name is needed")
        if target.exists() and not target.is_file():
            with open(target, "wb") as stream:
                stream.write(data)
        else:
            _replace(target, data)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(str(path), reason, "the file cannot be written") from error


def _replace(target: Path, data: bytes) -> None:
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:  # an interrupt too: no temporary file is left behind
        Path(temporary).unlink(missing_ok=True)
        raise
