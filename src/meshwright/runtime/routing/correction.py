"""The correction bias, which balances experts without a loss (arXiv:2408.15664; DeepSeek-V3 §2.1.2).

Shape letters: E experts; leading dims, such as layers, are allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def updated_bias(bias: Tensor, counts: Tensor, rate: float, recentre: bool = False) -> Tensor:
    """bias + rate·sign(mean − count): [..., E] FP32, once per global batch (arXiv:2408.15664, algorithm 1).

    counts: [..., E] int64, token copies of the whole global batch, added up over all ranks that hold
        different tokens. Half-precision counts would flip signs, so other types are refused.
    recentre: subtract the mean of the change, so that the biases' sum stays (torchtitan does).

    Raises TypeError for counts that are no integers.
    """
    if counts.is_floating_point():
        raise TypeError(f"counts are {counts.dtype}: exact integers are needed")
    with torch.no_grad():
        counts_E = counts.to(torch.int64)
        above_E = counts_E.sum(dim=-1, keepdim=True) - counts_E.shape[-1] * counts_E  # E·(mean − count)
        change_E = above_E.sign().float() * rate
        if recentre:
            change_E = change_E - change_E.mean(dim=-1, keepdim=True)
        return bias.float() + change_E
