"""Imports run one way, torch stays in the runtime, and names keep their rules.

The levels stand in one table below. A new module needs a line there before the test lets it in.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "meshwright"

LEVEL_OF = {
    # ground floor: no domain knowledge
    "errors": "ground",
    "units": "ground",
    "torchrun": "ground",
    "files": "ground",
    "decoding": "ground",
    # nouns: pure data and integer arithmetic
    "cluster": "nouns",
    "hardware": "nouns",
    "gpus": "nouns",
    "model": "nouns",
    "families": "nouns",
    "config_keys": "nouns",
    "workload": "nouns",
    "layout": "nouns",
    "policy": "nouns",
    "claims": "nouns",
    "deployment": "nouns",
    "engines": "nouns",
    "eras": "nouns",
    "plan": "nouns",
    "timeline": "nouns",
    "report": "nouns",
    "calibration": "nouns",
    "machine": "nouns",
    "efficiency_table": "nouns",
    # what happens, how much of it
    "ir": "ir",
    "cost": "cost",
    # what is done with it
    "verify": "verify",
    "runnable": "verify",
    "audit": "audit",
    "groups": "groups",
    "scale_down": "scale_down",
    "planner": "planner",
    "simulator": "simulator",
    "runtime": "runtime",
    "validate": "validate",
    "dryrun": "dryrun",
    # measured on the machine at hand
    "calibrating": "measuring",
    "profiling": "measuring",
    "runs": "measuring",
    # what people see
    "terminal": "terminal",
    "simulation": "simulation",
    "training": "training",
    "export": "export",
    "page": "page",
    "cli": "cli",
    "delivery": "cli",
    "options": "cli",
    "dryrun_command": "cli",
    "machine_commands": "cli",
    "validating": "cli",
    "__main__": "main",
    "__init__": "package",
}

GROUND = {"ground"}
NOUNS = GROUND | {"nouns"}
IR = NOUNS | {"ir"}
COST = IR | {"cost"}
CONSUMERS = COST | {"verify", "audit", "groups", "scale_down", "planner", "simulator"}
MAY_IMPORT: dict[str, set[str]] = {
    "ground": GROUND,
    "nouns": NOUNS,
    "ir": IR,
    "cost": COST,
    # Consumers do not know one another when they load; all of them may ask whether a layout can exist.
    "verify": COST | {"verify"},
    "audit": COST | {"audit", "verify"},
    "groups": COST | {"groups", "verify"},
    "scale_down": IR | {"scale_down", "verify"},
    "planner": COST | {"planner", "verify"},
    "simulator": COST | {"simulator", "verify", "planner"},  # prices tasks as the estimate does
    "runtime": IR | {"runtime"},
    "validate": COST | {"validate", "verify", "planner", "simulator"},  # scores what both predict
    "dryrun": CONSUMERS | {"dryrun"},
    "simulation": CONSUMERS | {"simulation"},
    "measuring": CONSUMERS | {"measuring"},
    "terminal": CONSUMERS | {"terminal", "validate", "simulation", "measuring", "dryrun"},
    "training": CONSUMERS | {"terminal", "training", "measuring"},
    "export": CONSUMERS | {"export"},
    "page": CONSUMERS | {"page"},
    "cli": CONSUMERS
    | {
        "terminal",
        "validate",
        "training",
        "simulation",
        "measuring",
        "dryrun",
        "export",
        "page",
        "cli",
        "package",
    },
    "main": {"cli", "ground"},
    "package": CONSUMERS,
}
# Step times need numpy, which most audits do without (docs/decisions/0011).
# The simulator prices tasks by the planner's functions, and the planner's finalists run in it (0016).
MAY_IMPORT_IN_A_FUNCTION = {
    "training": {"runtime"},
    "dryrun": {"runtime"},
    "measuring": {"runtime"},
    "audit": {"planner"},
    "planner": {"simulator"},
}

THIRD_PARTY = {"pydantic", "pydantic_core", "yaml", "rich", "typer"}
"""What every level may import."""
THIRD_PARTY_OF = {
    "runtime": {"torch", "numpy", "tokenizers", "datasets", "pyarrow", "safetensors", "tensorboard"},
    "cost": {"numpy"},
    "planner": {"numpy"},
    "simulator": {"numpy"},
    "validate": {"numpy"},
}
"""What a level may import besides: torch is an extra, and numpy loads too slowly for commands without it."""

FORBIDDEN_FILES = {"utils.py", "common.py", "helpers.py"}
FORBIDDEN_CLASS = re.compile(r"^_?Base[A-Z]|(Manager|Handler|Helper)s?$|^Base$")
LONG_MODULE_LINES = 400


@dataclass(frozen=True)
class Import:
    """One import, seen from one module; `lazy` inside a function, `typing` for type checkers only."""

    importer: str
    target: str
    line: int
    lazy: bool
    typing: bool


def modules(package: Path) -> dict[str, Path]:
    """Dotted name inside the package of every module, `ir.graph` for `ir/graph.py` and `ir` for its init."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imports_of(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    """Every import of a module, wherever it stands; a target in the package loses the package's name."""

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in _targets(child, name, path, known):
                    yield Import(name, target, child.lineno, lazy, typing)
            in_function = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_typing = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from visit(child, in_function, for_typing)

    yield from visit(ast.parse(path.read_text("utf-8")), lazy=False, typing=False)


def _targets(
    node: ast.Import | ast.ImportFrom, name: str, path: Path, known: Mapping[str, Path]
) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (_inside(alias.name) for alias in node.names)
        return
    source = node.module or ""
    if node.level:
        package = ["meshwright", *name.split(".")]
        steps = node.level - (1 if path.name == "__init__.py" else 0)
        source = ".".join([*package[: len(package) - steps], *filter(None, [source])])
    inner = _inside(source)
    for alias in node.names:
        as_module = f"{inner}.{alias.name}".removeprefix("__init__.")
        yield as_module if as_module in known and source.startswith("meshwright") else inner


def _inside(dotted: str) -> str:
    if dotted == "meshwright":
        return "__init__"
    return dotted.removeprefix("meshwright.") if dotted.startswith("meshwright.") else f"outside:{dotted}"


def violations(package: Path) -> list[str]:
    """Every broken rule of the import table, as a line for people."""
    known = modules(package)
    problems = []
    for name, path in known.items():
        level = LEVEL_OF.get(name.split(".")[0])
        if level is None:
            problems.append(f"{name}: no level; give it one in tests/test_architecture.py")
            continue
        for item in imports_of(name, path, known):
            problem = _problem(item, level)
            if problem:
                problems.append(f"{path.relative_to(package)}:{item.line}: {problem}")
    return problems


def _problem(item: Import, level: str) -> str | None:
    if item.target.startswith("outside:"):
        top = item.target.removeprefix("outside:").split(".")[0]
        allowed = THIRD_PARTY | THIRD_PARTY_OF.get(level, set())
        if top in allowed or top in sys.stdlib_module_names:
            return None
        return f"{level} may not import {top}"
    target = LEVEL_OF.get(item.target.split(".")[0])
    if target is None:
        return f"imports {item.target}, which has no level"
    if target in MAY_IMPORT[level]:
        return None
    if item.lazy and target in MAY_IMPORT_IN_A_FUNCTION.get(level, set()):
        return None
    return f"{level} may not import {target} ({item.target})"


def cycles(package: Path) -> list[list[str]]:
    """Circles of the imports that run on loading: those in functions or for type checkers do not."""
    known = modules(package)
    edges = {
        name: sorted(
            {i.target for i in imports_of(name, path, known) if not i.lazy and not i.typing} & set(known)
        )
        for name, path in known.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
            return
        if name in done:
            return
        for target in edges[name]:
            walk(target, [*trail, name])
        done.add(name)

    for name in edges:
        walk(name, [])
    return found


def bad_names(package: Path) -> list[str]:
    """Files and classes whose names say nothing."""
    problems = []
    for path in sorted(package.rglob("*.py")):
        if path.name in FORBIDDEN_FILES or "common" in path.relative_to(package).parts[:-1]:
            problems.append(f"{path.relative_to(package)}: name the file after what it holds")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and FORBIDDEN_CLASS.search(node.name):
                problems.append(f"{path.relative_to(package)}:{node.lineno}: class {node.name}")
    return problems


def test_imports_run_one_way() -> None:
    assert violations(PACKAGE) == []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert cycles(PACKAGE) == []


def test_names_say_what_is_inside() -> None:
    assert bad_names(PACKAGE) == []


def test_every_level_of_the_table_is_reachable() -> None:
    assert set(LEVEL_OF.values()) == set(MAY_IMPORT)
    assert set().union(*MAY_IMPORT.values()) <= set(MAY_IMPORT)


def test_long_modules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Never fails: it prints what deserves a second look."""
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    with capsys.disabled():
        for path, lines in sorted(sizes.items(), key=lambda item: -item[1]):
            if lines > LONG_MODULE_LINES:
                print(f"\nnote: {path.relative_to(PACKAGE)} has {lines} lines", end="")
    assert sizes


SEEDED = {
    "upward": ("ir/graph.py", "from meshwright.cost import memory\n", "ir may not import cost"),
    "upward in a function": (
        "layout.py",
        "def f():\n    from meshwright import plan, verify\n",
        "nouns may not import verify",
    ),
    "upward by a relative import": ("units.py", "from . import layout\n", "ground may not import nouns"),
    "upward from a folder": ("cost/memory.py", "from ..audit import audit\n", "cost may not import audit"),
    "for a type checker": (
        "ir/graph.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import meshwright.cost.memory\n",
        "ir may not import cost",
    ),
    "torch outside the runtime": ("cost/memory.py", "import torch.nn\n", "cost may not import torch"),
    "torch in a function": (
        "cost/memory.py",
        "def f():\n    from torch import nn\n",
        "cost may not import torch",
    ),
    "runtime at load": (
        "training.py",
        "from meshwright.runtime import train\n",
        "training may not import runtime",
    ),
    "an undeclared package": ("audit.py", "import numpy\n", "audit may not import numpy"),
    "a module without a level": ("surprise.py", "", "surprise: no level"),
    "one consumer in another": (
        "audit.py",
        "from meshwright.planner import search\n",
        "audit may not import planner",
    ),
    "one consumer in a function of another": (
        "audit.py",
        "def f():\n    from meshwright.simulator import engine\n",
        "audit may not import simulator",
    ),
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small package that keeps every rule."""
    package = tmp_path / "meshwright"
    for name in ("__init__", "errors", "units", "layout", "plan", "verify", "audit", "training"):
        (package / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("import math\n")
    for folder, name in (("ir", "graph"), ("cost", "memory"), ("planner", "search"), ("runtime", "train")):
        (package / folder).mkdir()
        (package / folder / "__init__.py").write_text("")
        (package / folder / f"{name}.py").write_text("from meshwright.errors import x\n")
    (package / "runtime" / "train.py").write_text("import torch\nfrom meshwright.ir import graph\n")
    (package / "training.py").write_text("def f():\n    from meshwright.runtime import train\n")
    return package


def test_a_clean_house_passes(house: Path) -> None:
    assert violations(house) == []
    assert cycles(house) == []
    assert bad_names(house) == []


@pytest.mark.parametrize("seed", SEEDED)
def test_a_seeded_import_is_found(seed: str, house: Path) -> None:
    path, text, expected = SEEDED[seed]
    (house / path).write_text(text)
    assert [problem for problem in violations(house) if expected in problem], violations(house)


def test_a_seeded_circle_is_found(house: Path) -> None:
    (house / "layout.py").write_text("from meshwright import plan\n")
    (house / "plan.py").write_text("def f():\n    import meshwright.layout\n")
    assert cycles(house) == []
    (house / "plan.py").write_text("import meshwright.layout\n")
    assert cycles(house) == [["layout", "plan", "layout"]]


def test_a_seeded_name_is_found(house: Path) -> None:
    (house / "ir" / "utils.py").write_text("class OpManager: ...\nclass BaseOp: ...\nclass Baseline: ...\n")
    assert len(bad_names(house)) == 3


LOADED_WITHOUT_TORCH = """
import sys
import meshwright
from meshwright.__main__ import main

TORCH = {"torch", "transformers", "megatron"}
for arguments, heavy in (
    (["--help"], {*TORCH, "numpy"}),
    (["groups", "examples/brief-repaired.yaml", "--json"], {*TORCH, "numpy"}),
    (["audit", "examples/brief-repaired.yaml", "--json"], {*TORCH, "numpy"}),  # no figure of speed
    (["schema"], {*TORCH, "numpy"}),
    (["audit", "examples/brief.yaml", "--json"], TORCH),
    (["plan", "examples/qwen3-30b-a3b-16.yaml", "--json"], TORCH),
):
    sys.argv = ["meshwright", *arguments]
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    assert not code, (arguments, code)
    assert not heavy & set(sys.modules), (arguments, heavy & set(sys.modules))
"""


def test_planning_commands_load_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED_WITHOUT_TORCH],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# Written apart, so that this file does not name them itself.
_MACHINE_PATH = re.compile(
    r"(?<![\w.~$}-])/(?:" + "|".join(("home", "root", "work", "opt/py" + "pi", "opt/whe" + "els")) + r")/\w"
)
_REGISTRY_HOST = re.compile(
    "|".join(("py" + r"pi\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org"))
)
_TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".csv", ".cfg", ".svg", ".sh", ""}


def project_files() -> list[Path]:
    """What git tracks or would track; without git, everything but folders that hold no sources."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    skipped = {"site", "build", "dist", "__pycache__"}
    return [
        path
        for path in ROOT.rglob("*")
        if not any(
            part in skipped or (part.startswith(".") and part != ".ci")
            for part in path.relative_to(ROOT).parts[:-1]
        )
    ]


def test_no_file_names_a_developers_machine() -> None:
    found = []
    for path in project_files():
        if path.suffix not in _TEXT_SUFFIXES or not path.is_file():
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if _MACHINE_PATH.search(line) or _REGISTRY_HOST.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
