"""Tests of this folder share modules that stand beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with the text that training runs read, and with what they share: one for all workers."""
    from training_runs import write_corpus

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "corpus"
    folder.mkdir(exist_ok=True)
    return write_corpus(folder)
