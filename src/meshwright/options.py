"""Arguments and options that several commands share, each with one name, one help and one check."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from meshwright.errors import InputError

File = Annotated[str, typer.Argument(metavar="FILE", help="A deployment file (YAML or JSON).")]
Plan = Annotated[str, typer.Argument(metavar="PLAN", help="A plan's file, or a deployment file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="PATH", help="Write the output there instead, whole or not at all."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file: layout.tp=4. Repeatable."),
]
Full = Annotated[bool, typer.Option("--full", help="Show every formula, memory line and reason.")]
Calibration = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Price ops and collectives by what `calibrate` measured there."),
]
History = Annotated[
    str | None, typer.Option(metavar="DIR", help="Say how far predictions of the runs there were off.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 when something checked does not hold.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the ranks compute.")]


def guard_input(file: str, output: str | None, flag: str = "--output") -> None:
    """Raise InputError for standard input, and where the output would overwrite the input."""
    if file == "-":
        raise InputError("FILE", file, "standard input is not read; give the path of a file")
    if output and os.path.exists(output) and os.path.exists(file) and os.path.samefile(output, file):
        raise InputError(flag, output, "the file that is read would be overwritten")


def with_calibration(overrides: Sequence[str] | None, calibration: str | None) -> tuple[str, ...]:
    """The overrides with a table's file put in, by its path from the working directory."""
    changes = tuple(overrides or ())
    if calibration is None:
        return changes
    if not calibration.strip():
        raise InputError("--calibration", calibration, "the path of a table", ["here.yaml"])
    return (*changes, f"cluster.calibration={_quoted(os.path.abspath(calibration))}")


def _quoted(path: str) -> str:
    """A path as YAML text that is read back as it stands."""
    return "'" + path.replace("'", "''") + "'"
