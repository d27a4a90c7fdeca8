"""The command `dryrun`: reads a plan, runs its ranks without memory, prints what they hold and do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.delivery import present, tell
from meshwright.options import Json, Output, Overrides, Plan, Strict, guard_input

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(dryrun)


def dryrun(
    file: Plan,
    ranks: Annotated[
        str,
        typer.Option(metavar="classes|all|N,N", help="Whose whole step to run: one of each class, or these."),
    ] = "classes",
    strict: Strict = False,
    as_json: Json = False,
    output: Output = None,
    overrides: Overrides = None,
) -> None:
    """Build and run every rank without GPUs or memory."""
    from meshwright.dryrun import Asked, answered
    from meshwright.terminal.progress import progress_bar

    guard_input(file, output)
    with progress_bar() as progress:
        answer = answered(Asked(file, tuple(overrides or ()), ranks), progress)

    def show(console: Console) -> None:
        from meshwright.terminal.dryrun import show_dry_run

        show_dry_run(answer, console)

    present(answer.document, show, as_json, output)
    if as_json:
        tell(answer.plan.defaults, ())
    if strict and not answer.holds:
        raise typer.Exit(1)
