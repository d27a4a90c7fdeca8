"""Tests of this folder share modules that stand beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text that training runs read."""
    from parity_runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus"))
