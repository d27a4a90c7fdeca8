"""The pages are true: their deployments decode, their commands exist, their figures are the computed ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from meshwright.__main__ import main
from meshwright.cost.memory import memory
from meshwright.deployment import deployment_from
from meshwright.errors import InputError
from meshwright.files import parse_yaml
from meshwright.ir.parameters import count_parameters
from meshwright.ir.program import Program, lower
from meshwright.ir.schedule import bubble_slots, build_schedule, peak_in_flight
from meshwright.ir.sharding import local_numel
from meshwright.ir.tasks import CommTask
from meshwright.plan import Plan, resolve
from meshwright.planner.estimate import StepTime, estimate, running_of
from meshwright.planner.interval import interval
from meshwright.planner.prices import Conditions, prices
from meshwright.planner.times import axis_groups, block_times, kernel_times, price_collective, price_op
from meshwright.policy import SCHEDULES
from meshwright.verify import verify

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`(meshwright [^`]+)`")
HOW_IT_WORKS = ROOT / "docs" / "how-it-works.md"


def fences(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages."""
    return [text for language, text in FENCE.findall(page.read_text("utf-8")) if language in languages]


def deployments(page: Path) -> list[str]:
    """The YAML blocks of a page that hold a whole deployment."""
    blocks = fences(page, "yaml")
    return [
        text for text in blocks if re.search(r"^cluster:", text, re.M) and re.search(r"^model:", text, re.M)
    ]


def command_lines(page: Path) -> list[str]:
    """Every command line of meshwright on a page: in fenced blocks, after a prompt, or in running text."""
    text = page.read_text("utf-8")
    lines = [line.strip() for block in FENCE.findall(text) for line in block[1].splitlines()]
    lines = [re.sub(r"^(\$ |.*/bin/)", "", line).split(" #")[0].strip() for line in lines]
    found = [line for line in lines if re.match(r"meshwright( [a-z-]|$)", line)]
    return found + INLINE_COMMAND.findall(FENCE.sub("", text))


def ids(pages: list[tuple[Path, str]]) -> list[str]:
    """Names of test cases: the page and the first words."""
    return [f"{page.relative_to(ROOT)}: {' '.join(text.split())[:60]}" for page, text in pages]


DEPLOYMENTS = [(page, text) for page in PAGES for text in deployments(page)]
COMMANDS = [(page, line) for page in PAGES for line in dict.fromkeys(command_lines(page))]


@pytest.mark.parametrize(("page", "text"), DEPLOYMENTS, ids=ids(DEPLOYMENTS))
def test_deployments_decode(page: Path, text: str) -> None:
    plan = resolve(deployment_from(parse_yaml(text, page.name), ROOT))
    assert plan.layout.world_size == plan.cluster.num_gpus


def test_pages_show_deployments_and_commands() -> None:
    assert {page.name for page, _ in DEPLOYMENTS} >= {"README.md", "quickstart.md", "how-it-works.md"}
    assert {page.name for page, _ in COMMANDS} >= {"README.md", "quickstart.md"}


@cache
def help_of(command: str) -> str:
    """What `meshwright COMMAND --help` prints. Fails for a command that does not exist."""
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", *([command] if command else []), "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"meshwright {command}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=ids(COMMANDS))
def test_commands_exist(page: Path, line: str) -> None:
    words = shlex.split(line)[1:]
    command = words[0] if words and not words[0].startswith("-") else ""
    known = help_of(command)
    for word in words[1 if command else 0 :]:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word.split('=')[0])}(?![\w-])", known), (
                f"{word} in {line}"
            )
        elif word.startswith("examples/"):
            assert (ROOT / word).is_file(), word


def test_the_error_of_the_quickstart_is_the_real_one() -> None:
    (line,) = re.findall(r"^error: (.*)$", (ROOT / "docs" / "quickstart.md").read_text("utf-8"), re.M)
    gpu = {"memory": 64, "memory_bandwidth": "3 TB/s", "peak": {"bf16": "400 TFLOP/s"}}
    workload = {"global_batch_size": 64, "sequence_length": 4096}
    document = {"cluster": {"nodes": 2, "gpu": gpu}, "model": "qwen3-30b-a3b", "workload": workload}
    with pytest.raises(InputError) as caught:
        deployment_from(document, ROOT)
    assert str(caught.value) == line


def test_links_between_pages_and_files_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text("utf-8"))):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_decision_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


README = ROOT / "README.md"


@pytest.mark.parametrize(
    ("first", "command"),
    [
        ("Layout TP8 PP4", "audit examples/brief.yaml"),
        (
            "tokens   planned",
            "plan examples/brief-plan.yaml --against examples/brief-repaired.yaml"
            " --lengths 128,1024,4096,10240 --top 1",
        ),
    ],
    ids=["audit", "plan --against"],
)
def test_the_output_on_the_first_page_is_the_real_one(
    first: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line that the page shows is printed, in this order."""
    (shown,) = (text for text in fences(README, "") if text.startswith(first))
    assert main(command.split()) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    missing = [line for line in shown.splitlines() if line not in printed]
    assert missing == []


def test_the_errors_on_the_first_page_are_those_of_the_accuracy_page() -> None:
    """Rows, mean and median error of each group, with recipes held back, and the mean error of memory."""
    accuracy = (ROOT / "docs" / "accuracy.md").read_text("utf-8")
    section = README.read_text("utf-8").split("## How sure it is")[1].split("## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (\d+) \| ([\d.]+ %) \| ([\d.]+ %) \|", section, re.MULTILINE)
    assert len(rows) == 4
    held_back = accuracy.split("## Step time, held back")[1].split("With the shipped constants")[0]
    assert [row for row in rows if f"| {row[0]} | {row[1]} | {row[2]} |" not in held_back] == []


# The worked example: every figure on the page is the computed one.


@pytest.fixture(scope="module")
def program() -> Program:
    """The deployment of docs/how-it-works.md, lowered."""
    (text,) = deployments(HOW_IT_WORKS)
    plan = resolve(deployment_from(parse_yaml(text), ROOT))
    assert verify(plan) == []
    return lower(plan)


@pytest.fixture(scope="module")
def page() -> str:
    return HOW_IT_WORKS.read_text("utf-8")


def test_worked_parameters(program: Program, page: str) -> None:
    model, layout = program.plan.model, program.plan.layout
    counts = count_parameters(model)
    stage = program.stages[0]
    layer = [param for param in stage.params if param.name.startswith("layers.0.")]
    experts = [param for param in layer if param.is_expert]
    figures = [
        counts.total,
        counts.active,
        counts.by_part["embedding"],
        sum(param.numel for param in layer),
        sum(param.numel for param in experts),
        sum(local_numel(param, layout) for param in layer if not param.is_expert),
        sum(local_numel(param, layout) for param in experts),
        local_numel(stage.params[0], layout),
        sum(local_numel(param, layout) for param in stage.params),
    ]
    assert [n for n in figures if f"{n:,}" not in page] == []


def test_worked_layout(program: Program, page: str) -> None:
    layout = program.plan.layout
    for axis, view in (("tp", "dense"), ("dp", "dense"), ("ep", "expert"), ("edp", "expert")):
        groups = [group for group in layout.groups(axis, view) if max(group) < 8]  # type: ignore[arg-type]
        assert f"| `{axis}` | {' '.join(map(str, groups))} |" in page
    for rank in (0, 1, 5, 14):
        dense, expert = (layout.coordinates(rank, view).values() for view in ("dense", "expert"))  # type: ignore[arg-type]
        assert f"| {rank} | {', '.join(map(str, dense))} | {', '.join(map(str, expert))} |" in page


def test_worked_memory(program: Program, page: str) -> None:
    first, last = memory(program)
    gpu_bytes = program.plan.cluster.gpu.memory
    layer = program.stages[0].blocks[1]
    figures = [first.line(name) for name in ("weights", "gradients", "optimizer states", "activations")]
    figures += [layer.saved_bytes, sum(block.saved_bytes for block in program.stages[0].blocks)]
    shown = [f"{n:,}" for n in figures]
    shown += [f"{size / 1e9:.1f} GB" for size in (first.total_bytes, last.total_bytes, gpu_bytes)]
    unit_bytes = 2048 * program.plan.model.hidden_size * program.plan.workload.compute_bytes
    shown.append(f"**{layer.saved_bytes / unit_bytes:.2f}**")
    policy = program.plan.policy.model_copy(update={"engine": "megatron"})
    fused = lower(program.plan.model_copy(update={"policy": policy})).stages[0].blocks[1]
    shown.append(f"{fused.saved_bytes / unit_bytes:.2f} units")
    assert [text for text in shown if text not in page] == []
    assert (first.num_in_flight, last.num_in_flight) == (2, 1)


def test_worked_step_time(program: Program, page: str) -> None:
    section = page.split("## 8.")[1].split("## 9.")[0]
    step = estimate(program.plan)
    low, high = interval(program.plan, step.total_s)
    shown = [f"{1e3 * step.parts[part]:,.1f} ms" for part in ("compute", "dp", "host", "bubble", "optimizer")]
    shown.append(
        "{:.1f}, {:.1f} and {:.1f} ms".format(*(1e3 * step.parts[axis] for axis in ("tp", "ep", "pp")))
    )
    shown += [
        f"{1e3 * step.parts['other']:.1f} ms",
        f"{step.total_s:.3f} s",
        f"from {low:.3f} to {high:.3f} s",
    ]
    cluster = program.plan.cluster
    peak = cluster.gpu.peak_flops_per_s(program.plan.workload.precision) * cluster.num_gpus
    shown.append(f"MFU of {100 * step.model_flops / (peak * step.total_s):.1f} %")
    assert [text for text in shown if text not in section] == []


def test_worked_prices(program: Program, page: str) -> None:
    """Section 8 from its tasks up to the pipeline: alone, in a block, on both stages."""
    section = page.split("## 8.")[1].split("## 9.")[0]
    plan = program.plan
    priced = prices(plan.cluster, plan.workload.precision, plan.policy.engine)
    groups, running = axis_groups(plan.cluster, plan.layout.degrees()), running_of(plan, priced, Conditions())
    block = program.stages[0].blocks[1]
    names = ("attention.q", "attention.core", "moe.experts.gate", "moe.sort", "moe.dispatch")
    shown = []
    for name in names:
        (task,) = (t for t in block.tasks if t.phase == "forward" and t.name == f"layers.0.{name}")
        if isinstance(task, CommTask):
            parts = [float(seconds) for seconds in price_collective(task, priced, groups, running)]
        else:
            parts = [float(seconds) for seconds in price_op(task, priced, running).values()]
        shown.append(f"| {1e6 * sum(parts):.1f} µs |")
    kernels = kernel_times(block.tasks, priced, groups, running)
    alone = {part: f"{1e6 * float(seconds):.1f}" for part, seconds in kernels["forward"].items()}
    work = f"({alone['matmul']} + {priced.grouped} · {alone['grouped']} + {alone['attention']})"
    shown.append(f"{priced.slowdown:.4g} · {work} + {priced.memory} · {alone['memory']} |")
    phase = block_times(kernels, priced, running)["forward"]
    shown += [f"| {1e6 * float(phase[part]):,.1f} |" for part in ("compute", "tp", "ep", "host")]
    shown.append(f"| **{1e6 * sum(map(float, phase.values())):,.1f}** |")
    ops = sum(int(kernels["forward"][name]) for name in ("launches", "launches_experts"))
    shown.append(f"{ops} ops of {1e6 * priced.constants.host['experts'].value:.1f} µs")
    step = estimate(plan)
    once = sum(step.parts[part] for part in ("dp", "optimizer", "other"))
    m, first, second = _stage_times(plan, step.total_s - once, step)
    shown.append(f"{m} · {1e3 * second:.1f} + {1e3 * first:.1f} ms = {step.total_s - once:.3f} s")
    assert [text for text in shown if text not in section] == []


def _stage_times(plan: Plan, pipeline_s: float, step: StepTime) -> tuple[int, float, float]:
    """Micro-batches, and the seconds of one on each of two stages under 1F1B: the second is the slower one,
    m times, and the first fills and drains the pipeline, which is all of the bubble."""
    m = plan.num_micro_batches
    return m, step.parts["bubble"], (pipeline_s - step.parts["bubble"]) / m


def test_worked_collectives(program: Program, page: str) -> None:
    section = page.split("## 6.")[1].split("## 7.")[0]
    block = program.stages[0].blocks[1]
    tasks = [task for task in block.tasks if isinstance(task, CommTask) and task.phase == "forward"]
    rows = [line for line in section.splitlines() if re.match(r"\| [^|]+ \| `", line)]
    assert len(rows) == len(tasks)
    for row, task in zip(rows, tasks, strict=True):
        size = f"{task.bytes / 1e6:.1f} MB" if task.bytes > 1e6 else f"{task.bytes:,} bytes"
        assert f"| `{task.axis}` |" in row, (row, task)
        assert row.removesuffix(" |").endswith(size), (row, task)


@pytest.mark.parametrize("name", SCHEDULES)
def test_worked_schedules(name: str, program: Program, page: str) -> None:
    schedule = build_schedule(name, program.plan.layout.pp, program.plan.num_micro_batches)  # type: ignore[arg-type]
    (idle,) = set(bubble_slots(schedule))
    chunks, held = len(schedule.stages_of_rank[0]), sum(peak_in_flight(schedule)[0])
    in_flight = f"{held} chunks" if chunks > 1 else f"{held}"
    assert f"| {name} | {chunks} | {100 * idle:.2f}% | {in_flight} |" in page
