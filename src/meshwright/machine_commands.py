"""The commands about the machine at hand: measure it, profile a plan on it, list what ran on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.delivery import present, say
from meshwright.options import Calibration, Device, Json, Overrides, Plan, guard_input, with_calibration

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.cluster import Cluster

Document = Callable[[], Mapping[str, Any]]
Show = Callable[["Console"], None]


def with_history(
    document: Document, show: Show, folder: str | None, cluster: Cluster
) -> tuple[Document, Show]:
    """A result with what runs on its machine say of predictions, where a folder of runs is named. Raises
    InputError for a folder that is none."""
    if folder is None:
        return document, show
    from meshwright.runs import history_of, runs_in

    history = history_of(runs_in(folder, "--history"), cluster)

    def show_both(console: Console) -> None:
        show(console)
        console.print(f"History: {history.words}.")

    return (lambda: {**document(), "history": history.document()}), show_both


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (calibrate, profile, runs):
        app.command()(command)


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
        int | None,
        typer.Option(metavar="N", help="Local ranks at work, beside one alone (the plans', or 2)."),
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
        guard_input(path, output)
    with progress_bar() as progress:
        found = measure(asked, progress)
    if output is not None:
        say(f"note: the table is in {output}; `plan` and `simulate` take it by --calibration")

    def show(console: Console) -> None:
        from meshwright.terminal.calibrate import show_calibration

        show_calibration(found, console)

    present(found.document, show, as_json, None)


def profile(
    file: Plan,
    steps: Annotated[int, typer.Option(metavar="N", help="Time that many steps.")] = 10,
    nproc: Annotated[
        int | None, typer.Option(metavar="N", help="Ranks to start here; torchrun brings its own.")
    ] = None,
    device: Device = "auto",
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Keep plan, traces, figures there.")
    ] = None,
    calibration: Calibration = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Spread tokens evenly over experts, not by the router.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="Compute that rank's share alone: no others are started.")
    ] = None,
    as_json: Json = False,
    overrides: Overrides = None,
) -> None:
    """Run a plan's steps: where time goes, beside what was predicted."""
    from meshwright.profiling import Asked, ShareAnswer
    from meshwright.profiling import profile as run_profile
    from meshwright.terminal.progress import progress_bar

    changes = with_calibration(overrides, calibration)
    asked = Asked(file, changes, steps, nproc, output, device, balanced, rank)
    with progress_bar() as progress:
        answer = run_profile(asked, progress)
    if answer is None:  # under torchrun one rank speaks
        return

    def show(console: Console) -> None:
        from meshwright.terminal.profile import show_profile, show_share

        if isinstance(answer, ShareAnswer):
            show_share(answer, console)
        else:
            show_profile(answer, console)

    present(answer.document, show, as_json, None)


def runs(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where runs were kept.")] = "runs",
    as_json: Json = False,
) -> None:
    """List kept runs: predicted and measured, and the machine."""
    from meshwright.runs import runs_in

    found = runs_in(folder)

    def show(console: Console) -> None:
        from meshwright.terminal.runs import show_runs

        show_runs(found, console)

    present(lambda: {"runs": [one.document() for one in found]}, show, as_json, None)
