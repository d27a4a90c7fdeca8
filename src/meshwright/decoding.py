"""From the mapping in a file to nouns; what is wrong is one error: key, value, rule and nearest values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from meshwright.errors import InputError, shown

_LONGEST_WORD = 60
# Parts of an error's place that stand in no file.
_PYDANTIC_STEP = re.compile(r"(?:|function-\w+|tuple|list|set|dict|union|literal|nullable)\[.*\]\Z")


class Noun(BaseModel):
    """Base of everything that stands in a file: frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with fields replaced; what was computed from the old fields is not carried over."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


NounT = TypeVar("NounT", bound=BaseModel)


def decode(noun: type[NounT], document: Mapping[str, Any], key: str = "") -> NounT:
    """Build a noun from a file's mapping. Raises one InputError: key, value, rule, nearest valid values."""
    try:
        return noun.model_validate(document)
    except ValidationError as error:
        raise _as_input_error(noun, error, key) from None


def _as_input_error(noun: type[BaseModel], error: ValidationError, key: str) -> InputError:
    # An unknown key comes first: it is often the misspelt form of one that is missing.
    problems = sorted(
        error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden"
    )
    first = problems[0]
    path = _path(key, first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ValidationError):  # a validator built a noun of its own: its path goes on from here
        return _as_input_error(_noun_called(cause.title) or noun, cause, path)
    if isinstance(cause, InputError):
        path = _joined(path, cause.key)
        value, rule, nearest = cause.value, cause.rule, cause.nearest
    else:
        value, rule, nearest = _plain_problem(noun, first)
    others = dict.fromkeys(_path(key, problem["loc"]) for problem in problems[1:])
    others.pop(path, None)
    if others:
        rule += f"; also wrong: {', '.join(list(others)[:4])}"
    return InputError(path or "file", value, rule, nearest)


def _joined(path: str, inner: str) -> str:
    """A path and the key below it; a key that repeats the path's end, or names no place, adds nothing."""
    words = path.split(".") if path else []
    below = [] if inner in ("value", "file") else inner.split(".")
    overlap = next((n for n in range(len(below), 0, -1) if words[-n:] == below[:n]), 0)
    return ".".join(words + below[overlap:])


def _path(key: str, loc: Sequence[int | str]) -> str:
    words = [key] if key else []
    for part in loc:
        if isinstance(part, int):
            words[-1:] = [f"{words[-1] if words else ''}[{part}]"]
        elif not _PYDANTIC_STEP.match(part):
            words.append(key_in_words(part))
    return ".".join(words)


def key_in_words(key: str) -> str:
    """A key as it stands in a message: as it is, or quoted and cut when it could garble the screen."""
    return key if key.isprintable() and 0 < len(key) <= _LONGEST_WORD else shown(key)


def _noun_called(title: str) -> type[BaseModel] | None:
    known = [Noun]
    for noun in known:
        if noun.__name__ == title:
            return noun
        known.extend(noun.__subclasses__())
    return None


def _plain_problem(noun: type[BaseModel], problem: ErrorDetails) -> tuple[object, str, tuple[object, ...]]:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        fields = _fields_at(noun, problem["loc"][:-1])
        word = str(problem["loc"][-1])[:_LONGEST_WORD]
        near = difflib.get_close_matches(word, fields, n=3, cutoff=0.5) or fields[:8]
        return value, "unknown key", tuple(near)
    if kind == "missing":
        return "missing", "the key is needed", ()
    if kind == "literal_error":
        expected = str(problem.get("ctx", {}).get("expected", ""))
        words = [quoted or number for quoted, number in re.findall(r"'([^']*)'|(\d+)", expected)]
        given = value[:_LONGEST_WORD] if isinstance(value, str) else shown(value)
        near = difflib.get_close_matches(given, words, n=1) + words
        return value, "not one of the values", tuple(dict.fromkeys(near))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return value, "a mapping of keys to values is needed", tuple(_fields_at(noun, problem["loc"])[:8])
    return value, problem["msg"][0].lower() + problem["msg"][1:], ()


def _fields_at(noun: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names of the fields of the noun that a path leads to."""
    current: type[BaseModel] = noun
    for part in loc:
        field = current.model_fields.get(str(part))
        if field is None:
            continue
        for candidate in _model_types(field.annotation):
            current = candidate
            break
    return list(current.model_fields)


def choice(built: object, forms: Mapping[str, type[Noun]], plain: str) -> object:
    """Read a value that has several forms: a mapping whose key says which noun it is, or a plain value.

    Made for pydantic's BeforeValidator. Unlike a bare union, a wrong key is reported for the form that was
    meant, not for every form that was not.
    """
    if not isinstance(built, dict):
        return built
    for mark, noun in forms.items():
        if mark in built:
            return decode(noun, built)
    near = [f"{{{mark}: …}}" for mark in forms]
    raise InputError("value", built, f"either {plain} or a mapping", near)


def _model_types(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _model_types(part)]


def json_schema(noun: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a file, for editors."""
    schema = noun.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
