"""The command line: reads a file, calls one function, prints what it gives.

Everything heavy is imported inside the commands, so that `--help` answers at once. Errors leave as
exceptions; `__main__` turns them into one line and an exit code.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright import __version__
from meshwright.delivery import BROKEN_PIPE, deliver, discard_the_rest, present, say, tell
from meshwright.dryrun_command import register as register_dryrun
from meshwright.errors import InputError
from meshwright.machine_commands import register, with_history
from meshwright.options import (
    Calibration,
    Device,
    File,
    Full,
    History,
    Json,
    Output,
    Overrides,
    Plan,
    Strict,
    guard_input,
    with_calibration,
)

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.deployment import Deployment, Placement, PlacementT

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""The error of a wrong command line: typer carries its own parser or uses click's, by version."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Describe a mixture-of-experts deployment, audit its figures, plan its layout, see who talks to whom."""
    if version:
        deliver(f"meshwright {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        deliver(f"{context.get_help()}\n")


@app.command()
def audit(
    file: File,
    full: Full = False,
    strict: Strict = False,
    as_json: Json = False,
    output: Output = None,
    overrides: Overrides = None,
) -> None:
    """Check what a document claims about its deployment."""
    from meshwright.audit import audit as audit_deployment
    from meshwright.deployment import Deployment
    from meshwright.terminal.audit import show_audit

    report = audit_deployment(read(file, overrides, output, Deployment))
    present(report.document, lambda console: show_audit(report, console, full), as_json, output)
    if strict and not report.holds:
        raise typer.Exit(1)


@app.command()
def groups(
    file: File,
    rank: Annotated[str | None, typer.Option(metavar="N", help="Show all about one rank instead.")] = None,
    as_json: Json = False,
    output: Output = None,
    overrides: Overrides = None,
) -> None:
    """List the ranks of each parallel group and the links they cross."""
    from meshwright.deployment import Deployment, Placement

    if rank is None:
        _all_groups(read(file, overrides, output, Placement), as_json, output)
    else:
        number = _rank_number(rank)
        _groups_of_rank(read(file, overrides, output, Deployment), number, as_json, output)


def _rank_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError("--rank", text, "a rank is a whole number, counted from 0", [0]) from None


def _all_groups(placement: Placement, as_json: bool, output: str | None) -> None:
    from meshwright.groups import group_tables
    from meshwright.plan import resolve_layout
    from meshwright.verify import cluster_findings

    cluster, defaults = placement.cluster.resolve()
    layout, chosen = resolve_layout(placement.layout, cluster, placement.policy.schedule)
    defaults = {**defaults, **chosen}
    findings = list(cluster_findings(cluster, layout))

    def show(console: Console) -> None:
        from meshwright.terminal.groups import show_groups

        show_groups(placement.name, cluster, layout, defaults, findings, console)

    present(lambda: group_tables(layout), show, as_json, output)
    if as_json:
        tell(defaults, findings)


def _groups_of_rank(deployment: Deployment, rank: int, as_json: bool, output: str | None) -> None:
    from meshwright.groups import rank_facts
    from meshwright.plan import resolve
    from meshwright.verify import cluster_findings

    plan = resolve(deployment)
    facts = rank_facts(plan, rank)
    findings = list(cluster_findings(plan.cluster, plan.layout))

    def show(console: Console) -> None:
        from meshwright.terminal.groups import show_rank

        show_rank(plan, facts, findings, console)

    present(facts.document, show, as_json, output)
    if as_json:
        tell(plan.defaults, findings)


@app.command()
def plan(
    file: Annotated[str | None, typer.Argument(metavar="[FILE]", help="A deployment file.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Without a file: the model.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Without a file: the GPU.")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="Without a file: how many.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Sequences per step (1024).")] = None,
    seq: Annotated[int | None, typer.Option(metavar="N", help="Tokens per sequence (4096).")] = None,
    explain: Annotated[
        str | None, typer.Option(metavar="tp=8,pp=4", help="Say why this choice is not the best.")
    ] = None,
    scaling: Annotated[
        str | None, typer.Option(metavar="64,128,…", help="The best plan at each number of GPUs.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="'step_time <= 16 ms'", help="The fewest GPUs that meet it."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Hold the best plan against this file's layout.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="128,4096,…", help="Tokens to compare at (shortest and longest).")
    ] = None,
    top: Annotated[int | None, typer.Option(metavar="N", help="Plans to list (10).")] = None,
    as_json: Json = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="PATH", help="Write the best plan's file there.")
    ] = None,
    calibration: Calibration = None,
    history: History = None,
    overrides: Overrides = None,
) -> None:
    """Search layouts and policies for the fastest that fit."""
    from meshwright.planner.request import Request, answered
    from meshwright.terminal.progress import progress_bar

    for path in (file, against):
        if path is not None:
            guard_input(path, output)
    changes = with_calibration(overrides, calibration)
    asked = (explain, scaling, target, top, changes, against, lengths)
    request = Request(file, model, gpu, gpus, batch, seq, *asked)
    with progress_bar() as progress:
        result = answered(request, progress)
    if output is not None and result.answer.best is None:
        say(f"note: no plan fits, so {output} is not written")
    elif output is not None:
        result.write(output)

    def show(console: Console) -> None:
        from meshwright.terminal.plan import show_plans

        show_plans(result, console)

    present(*with_history(result.document, show, history, result.answer.space.cluster), as_json, None)


@app.command()
def simulate(
    file: Plan,
    lengths: Annotated[
        str | None, typer.Option(metavar="128,4096,…", help="Tokens of a sequence (shortest and longest).")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Draw routing, and stragglers if asked, N times.")
    ] = None,
    stragglers: Annotated[
        float | None, typer.Option(metavar="SIGMA", help="Spread of how much slower ranks are: 0.02.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of what is drawn.")] = 0,
    every_rank: Annotated[
        bool, typer.Option("--every-rank", help="Run every pipeline, not one that stands for all.")
    ] = False,
    schedules: Annotated[
        bool, typer.Option("--schedules", help="Compare all six schedules on the plan's degrees.")
    ] = False,
    place_experts: Annotated[
        bool, typer.Option("--place-experts", help="Even the load by placing experts, from their counts.")
    ] = False,
    failures: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="Between failures of the job, 8 h, or a published rate's name."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="For which a checkpoint stops training; 30 s unless given."),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the events there, for Perfetto (.json.gz).")
    ] = None,
    svg: Annotated[str | None, typer.Option(metavar="FILE", help="Write a Gantt chart there.")] = None,
    as_json: Json = False,
    output: Output = None,
    calibration: Calibration = None,
    history: History = None,
    overrides: Overrides = None,
) -> None:
    """Run a step event by event: its timeline and its critical path."""
    from meshwright.simulation import Asked, answered
    from meshwright.terminal.progress import progress_bar

    for flag, path in (("--output", output), ("--trace", trace), ("--svg", svg)):
        guard_input(file, path, flag)
    drawn = (lengths, samples, stragglers, seed, every_rank)
    changes = with_calibration(overrides, calibration)
    asked = Asked(file, changes, *drawn, schedules, place_experts, failures, checkpoint, trace, svg)
    with progress_bar() as progress:
        answer = answered(asked, progress)

    def show(console: Console) -> None:
        from meshwright.terminal.simulate import show_simulation

        show_simulation(answer, console)

    present(*with_history(answer.document, show, history, answer.plan.cluster), as_json, output)


@app.command()
def train(
    file: Plan,
    nproc: Annotated[
        int | None, typer.Option(metavar="N", help="Ranks to start here; torchrun brings its own.")
    ] = None,
    scale_down: Annotated[
        bool, typer.Option("--scale-down", help="Shrink model and layout to what one machine trains.")
    ] = False,
    device: Device = "auto",
    steps: Annotated[int | None, typer.Option(metavar="N", help="Train that many steps.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="DIR", help="Keep plan, steps, checkpoints there.")
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="N", help="Save a checkpoint every N steps, not at the end alone.")
    ] = 0,
    keep: Annotated[int | None, typer.Option(metavar="N", help="Keep the newest N checkpoints.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in DIR, on any layout.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line a step, nothing else.")
    ] = False,
    calibration: Calibration = None,
    overrides: Overrides = None,
) -> None:
    """Train a plan, on ranks of this machine or under torchrun."""
    from meshwright.training import Asked
    from meshwright.training import train as train_file

    guard_input(file, None)
    priced = with_calibration(overrides, calibration)
    asked = Asked(
        file,
        tuple(overrides or ()) if scale_down else priced,
        nproc,
        scale_down,
        device,
        steps,
        output,
        save_every,
        keep,
        resume,
        as_json,
        calibration,
    )
    try:
        train_file(asked)
    except BrokenPipeError:  # whoever read the steps has seen enough
        discard_the_rest()
        raise typer.Exit(BROKEN_PIPE) from None


@app.command()
def validate(
    file: Annotated[str, typer.Argument(metavar="RUNS.csv", help="A table of measured runs.")],
    full: Annotated[bool, typer.Option("--full", help="Show every row and every refusal.")] = False,
    as_json: Json = False,
    output: Output = None,
    cross_validate: Annotated[
        bool,
        typer.Option("--cross-validate", help="Predict each row by constants fitted without its recipe."),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Fit the constants and write them there; cross-validates."),
    ] = None,
    residuals: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the widths of the 80 % intervals there; cross-validates."),
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulate", help="Simulate each row's step too, score and fit by that.")
    ] = False,
) -> None:
    """Predict measured runs, and score step time, ranking and memory."""
    from meshwright.validating import validation_of

    for flag, path in (("--output", output), ("--fit", fit), ("--residuals", residuals)):
        guard_input(file, path, flag)
    validation = validation_of(file, cross_validate, fit, residuals, simulated)

    def show(console: Console) -> None:
        from meshwright.terminal.validate import show_validation

        show_validation(validation, console, full)

    present(lambda: validation.document, show, as_json, output)


@app.command()
def schema(as_json: Json = False, output: Output = None) -> None:
    """Print the JSON schema of deployment files, for editors."""
    from meshwright.deployment import Deployment
    from meshwright.files import json_schema

    deliver(json.dumps(json_schema(Deployment), indent=2, ensure_ascii=False) + "\n", output)


def read(file: str, overrides: list[str] | None, output: str | None, noun: type[PlacementT]) -> PlacementT:
    """What stands in a file. Raises InputError also where the output would overwrite it."""
    from meshwright.plan import open_placement

    guard_input(file, output)
    return open_placement(file, noun, overrides or ())


register(app)
register_dryrun(app)
