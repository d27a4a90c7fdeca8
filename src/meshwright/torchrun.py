"""Whether torchrun, or whoever sets its variables, has started this process as one of several ranks."""

from __future__ import annotations

import os


def is_under_torchrun() -> bool:
    """Whether somebody else has started the ranks and says so in the environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Whether this process answers for all: it started them itself, or it is the first of torchrun's."""
    return not is_under_torchrun() or os.environ["RANK"] == "0"
