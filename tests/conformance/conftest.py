"""The conformance suite runs the layouts on which training is tested, and the faults of dry runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "dryrun", HERE.parent / "runtime"):
    sys.path.insert(0, str(folder))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the text that training runs read, and with what they share: one for all workers."""
    from training_runs import write_corpus

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "corpus"
    folder.mkdir(exist_ok=True)
    return write_corpus(folder)
