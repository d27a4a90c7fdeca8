"""A training run for people: who computes what, then a line now and then under a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any, Protocol, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from meshwright.cost.memory import held_params, state_bytes
from meshwright.deployment import Training
from meshwright.ir.program import lower
from meshwright.plan import Plan
from meshwright.terminal import PLAIN_WIDTH, printable
from meshwright.units import BYTES

MOST_RANKS = 32
"""Ranks that the table lists."""
LINES = 20
"""About how many steps get a line."""


class RankRow(Protocol):
    """What is shown of a rank: see `runtime.roster.RankFacts`."""

    @property
    def rank(self) -> int: ...
    @property
    def coordinates(self) -> dict[str, int]: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def has_embedding(self) -> bool: ...
    @property
    def has_head(self) -> bool: ...
    @property
    def experts(self) -> tuple[int, int] | None: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def device(self) -> str: ...


class StepRow(Protocol):
    """What is shown of a step: see `runtime.metrics.Record`."""

    @property
    def step(self) -> int: ...
    @property
    def loss(self) -> float: ...
    @property
    def aux_loss(self) -> float: ...
    @property
    def grad_norm(self) -> float | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def loss_scale(self) -> float: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def tokens_per_s(self) -> float: ...
    @property
    def expert_load_max_over_mean(self) -> float | None: ...
    @property
    def dropped_fraction(self) -> float: ...

    def document(self) -> dict[str, Any]:
        """The step as one JSON line holds it."""
        ...


class JsonLines:
    """One line for each step on standard output, and nothing else."""

    def started(self, ranks: Sequence[RankRow], steps_done: int) -> None:
        """Nothing is said of the ranks."""

    def stepped(self, step: StepRow) -> None:
        """Print the step."""
        sys.stdout.write(json.dumps(step.document(), allow_nan=False) + "\n")
        sys.stdout.flush()

    def ended(self) -> None:
        """Nothing is said of the end."""


class Screen:
    """The table of ranks, a line now and then, and a bar where standard output is a terminal."""

    def __init__(self, plan: Plan, steps: int, changes: Sequence[str], entropy: float) -> None:
        """`changes`: what was scaled down. `entropy`: of the corpus' tokens taken singly, in nats."""
        stream: TextIO = sys.stdout
        is_terminal = stream.isatty()
        self.console = Console(
            file=stream, width=None if is_terminal else PLAIN_WIDTH, markup=False, highlight=False
        )
        self.plan, self.steps, self.changes, self.entropy = plan, steps, changes, entropy
        self.every = max(1, steps // LINES)
        self.bar = _bar(self.console) if is_terminal else None
        self.task = self.bar.add_task("", total=steps) if self.bar is not None else None
        self.last: StepRow | None = None

    def started(self, ranks: Sequence[RankRow], steps_done: int) -> None:
        """Print what was changed, who computes what, and the heading of the lines."""
        self._head()
        predicted = predicted_weights(self.plan)
        self.console.print(rank_table(self.plan, ranks, predicted))
        self.console.print(_weights_line(ranks, predicted))
        if steps_done:
            self.console.print(f"resumed after step {steps_done:,}")
        self.console.print(
            f"\n{'step':>6}  {'loss':>8}  {'aux loss':>8}  {'grad norm':>9}  {'lr':>9}  "
            f"{'tokens/s':>9}  {'max/mean load':>13}  {'dropped':>7}"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=steps_done)
            self.bar.start()

    def stepped(self, step: StepRow) -> None:
        """Print the step, if it is one of those that are printed."""
        self.last = step
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step.step, description=f"loss {step.loss:.4f}")
        if step.skipped:
            self.console.print(f"{step.step:>6,}  overflow: skipped; the loss scale was {step.loss_scale:g}")
        elif step.step == 1 or step.step % self.every == 0 or step.step == self.steps:
            self.console.print(_step_line(step))

    def ended(self) -> None:
        """Take the bar away and hold the last loss against the corpus' entropy."""
        if self.bar is not None:
            with suppress(Exception):  # nothing that a bar does may hide the run's own error
                self.bar.stop()
        if self.last is not None and self.last.step == self.steps and isfinite(self.last.loss):
            relation = "below" if self.last.loss < self.entropy else "not below"
            self.console.print(
                f"\nloss {self.last.loss:.4f} nats per token, {relation} the {self.entropy:.4f} of a guess "
                "by the frequency of tokens alone"
            )

    def _head(self) -> None:
        plan, layout = self.plan, self.plan.layout
        degrees = " ".join(f"{name}{size}" for name, size in layout.degrees().items() if size > 1)
        text = f"{printable(plan.name)}: {degrees or 'one rank'}, {plan.policy.schedule}"
        self.console.print(Text(f"{text}, ZeRO {plan.policy.zero_stage}, {plan.workload.precision}", "bold"))
        if self.changes:
            self.console.print("scaled down: " + "; ".join(printable(change) for change in self.changes))
        _show_defaults(plan.defaults, self.console)
        self.console.print(_training_line(plan.training or Training(), plan.workload.optimizer))
        self.console.print()


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _show_defaults(defaults: Mapping[str, str], console: Console) -> None:
    if defaults:
        stated = "; ".join(f"{key} {printable(why)}" for key, why in defaults.items())
        console.print(f"defaults: {stated}")


def _training_line(training: Training, optimizer: str) -> str:
    """Every setting of the training, stated or not."""
    rate = f"learning rate {training.learning_rate:g}"
    if training.warmup_steps:
        rate += f" after {training.warmup_steps:,} warm-up steps, then along a cosine to "
        rate += f"{training.min_learning_rate:g}"
    words = [f"{training.steps:,} steps of {optimizer}", rate, f"weight decay {training.weight_decay:g}"]
    if optimizer == "adamw":
        words.append(f"betas {training.beta1:g} and {training.beta2:g}, epsilon {training.epsilon:g}")
    else:
        words.append(f"momentum {training.momentum:g}")
    words.append(
        f"gradients clipped at {training.gradient_clip:g}" if training.gradient_clip else "no clipping"
    )
    data = "a corpus that Python brings along" if training.data is None else printable(training.data)
    words.append(f"{training.documents} documents of {data}, tokenizer {printable(training.tokenizer)}")
    return f"training: {', '.join(words)}, seed {training.seed}"


def _step_line(step: StepRow) -> str:
    norm = "" if step.grad_norm is None else f"{step.grad_norm:.4f}"
    load = "" if step.expert_load_max_over_mean is None else f"{step.expert_load_max_over_mean:.2f}"
    return (
        f"{step.step:>6,}  {step.loss:>8.4f}  {step.aux_loss:>8.4f}  {norm:>9}  {step.lr:>9.2e}  "
        f"{step.tokens_per_s:>9,.0f}  {load:>13}  {step.dropped_fraction:>7.2%}"
    )


def rank_table(plan: Plan, ranks: Sequence[RankRow], predicted: Sequence[int]) -> Table:
    """Who computes what, with the bytes of weights that are predicted of its pipeline rank and those held."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    axes = [axis for axis in ("pp", "dp", "tp", "etp", "ep", "edp") if plan.layout.size(axis) > 1]
    for name in ("rank", *axes):
        table.add_column(name, justify="right")
    for name in ("layers", "experts"):
        table.add_column(name)
    for name in ("weights predicted", "weights held"):
        table.add_column(name, justify="right")
    for facts in ranks[:MOST_RANKS]:
        row = [str(facts.rank), *(str(facts.coordinates[axis]) for axis in axes)]
        row += [_layers(facts), _experts(facts)]
        row += [f"{predicted[facts.coordinates['pp']]:,} B", f"{facts.weight_bytes:,} B"]
        table.add_row(*row)
    return table


def predicted_weights(plan: Plan) -> list[int]:
    """Bytes of weights that the memory model gives each pipeline rank."""
    program = lower(plan)
    return [
        state_bytes(plan, held_params(program.stages_of(rank)))["weights"] for rank in range(plan.layout.pp)
    ]


def _weights_line(ranks: Sequence[RankRow], predicted: Sequence[int]) -> str:
    wrong = [r for r in ranks if r.weight_bytes != predicted[r.coordinates["pp"]]]
    largest = BYTES.format(max(r.weight_bytes for r in ranks))
    where = f"{len(ranks)} ranks on {ranks[0].device}"
    if not wrong:
        return f"{where}; weights: every rank holds what was predicted, at most {largest}"
    return f"{where}; weights: {len(wrong)} of {len(ranks)} ranks hold other bytes than predicted"


def _layers(facts: RankRow) -> str:
    parts = ["embedding"] if facts.has_embedding else []
    runs: list[list[int]] = []
    for layer in facts.layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts += [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join([*parts, *(["head"] if facts.has_head else [])])


def _experts(facts: RankRow) -> str:
    return "none" if facts.experts is None else f"{facts.experts[0]}–{facts.experts[1]}"
