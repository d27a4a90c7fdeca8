"""The command `dryrun`: reads a plan, runs its ranks without memory, prints what they hold and do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.delivery import present, tell

if TYPE_CHECKING:
    from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(dryrun)


def dryrun(
    file: Annotated[str, typer.Argument(metavar="PLAN", help="A plan's file, or a deployment file.")],
    ranks: Annotated[
        str,
        typer.Option(metavar="classes|all|N,N", help="Whose whole step to run: one of each class, or these."),
    ] = "classes",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when something checked does not hold.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="PATH", help="Write the output there instead, whole or not at all."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the file: layout.tp=4. Repeatable."),
    ] = None,
) -> None:
    """Build and run every rank without GPUs or memory."""
    from meshwright.cli import guard_input
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
