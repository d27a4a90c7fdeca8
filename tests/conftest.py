"""What all tests share: golden files, regenerated with `pytest --regenerate-golden`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

# One thread a process, before torch is loaded: ranks forked from a process whose OpenMP has threads of its
# own wait for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a developer's machine each run draws new examples; continuous integration repeats the same ones, so that
# a change is judged by what it changes.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden",
        action="store_true",
        help="write the golden files from what the code prints now; read the diff",
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the text that training runs read, and with what they share: one for all workers."""
    sys.path.insert(0, str(HERE / "runtime"))
    from training_runs import write_corpus

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "corpus"
    folder.mkdir(exist_ok=True)
    return write_corpus(folder)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: fail with a diff unless the golden file of that name holds the text."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--regenerate-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name} is missing; write it with pytest --regenerate-golden")
        stored = path.read_text(encoding="utf-8")
        if stored != text:
            names = (f"tests/golden/{name}", "printed now")
            diff = difflib.unified_diff(stored.splitlines(), text.splitlines(), *names, lineterm="")
            lines = "\n".join(diff) or "they differ in line ends only"
            pytest.fail(f"if the change is wanted: pytest --regenerate-golden\n{lines}", pytrace=False)

    return compare
