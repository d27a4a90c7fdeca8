"""The commands about the machine at hand: measure it, profile a plan on it, list what ran on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from meshwright.delivery import present, say
from meshwright.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file: layout.tp=4. Repeatable."),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the ranks compute.")]


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


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(calibrate)


def calibrate(
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the table there.")
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", metavar="PLAN", help="Measure this plan's shapes, not a grid. Repeatable."),
    ] = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="About how long to measure.")] = "60 s",
    nproc: Annotated[
        int | None, typer.Option(metavar="N", help="Local ranks at work, beside one alone (2).")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    overrides: Overrides = None,
) -> None:
    """Measure this machine: ops by shape, launches, collectives."""
    from meshwright.calibrating import Asked
    from meshwright.calibrating import calibrate as measure
    from meshwright.terminal.progress import progress_bar

    asked = Asked(tuple(plan or ()), tuple(overrides or ()), output, budget, nproc, device)
    for path in asked.plans:
        if output and os.path.exists(output) and os.path.exists(path) and os.path.samefile(output, path):
            raise InputError("--output", output, "the file that is read would be overwritten")
    with progress_bar() as progress:
        found = measure(asked, progress)
    if output is not None:
        say(f"note: the table is in {output}; `plan` and `simulate` take it by --calibration")

    def show(console: Console) -> None:
        from meshwright.terminal.calibrate import show_calibration

        show_calibration(found, console)

    present(found.document, show, as_json, None)
