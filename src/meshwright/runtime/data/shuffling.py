"""Orders that follow from a seed and an epoch, and from nothing else."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from meshwright.runtime.data.batch import IntArray


class Purpose(IntEnum):
    """What is shuffled: each in an order of its own."""

    DOCUMENTS = 0
    SEQUENCES = 1


def permutation(size: int, seed: int, epoch: int, purpose: Purpose) -> IntArray:
    """The numbers below `size` in the order of one epoch [size]."""
    # Three words rather than their sum: epoch 1 of seed 0 is not epoch 0 of seed 1.
    return np.random.default_rng([seed, epoch, purpose]).permutation(size)
