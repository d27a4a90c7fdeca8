"""The loss, over a vocabulary that tp may divide.

Shape letters: T tokens of a micro-batch, V a rank's share of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.data import IGNORED
from meshwright.runtime.region import Setting


def cross_entropy_sum(logits_TV: Tensor, targets_T: Tensor, setting: Setting) -> Tensor:
    """Sum over tokens of −log softmax(logits)[target], in FP32; ignored targets add nothing.

    The vocabulary is divided over tp: three all-reduces of one number per token, the maximum, the target's
    logit and the sum of exponentials (Megatron-LM `tensor_parallel/cross_entropy.py`).
    """
    logits_TV = logits_TV.float()
    group = setting.mesh.group("tp")
    if group is None:
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    first = setting.mesh.position("tp") * logits_TV.shape[-1]
    real = min(logits_TV.shape[-1], max(0, setting.model.vocab_size - first))
    return _VocabularyLoss.apply(logits_TV, targets_T, group, first, real)


class _VocabularyLoss(torch.autograd.Function):
    """Keeps the probabilities alone; their gradient is p − [target]."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, group: ProcessGroup, first: int, real: int
    ) -> Tensor:
        logits_TV = logits_TV.clone()
        logits_TV[:, real:] = float("-inf")  # rows that only pad the table
        most_T = all_reduce(logits_TV.amax(-1), group, dist.ReduceOp.MAX)
        logits_TV -= most_T.unsqueeze(-1)
        local_T = targets_T - first
        here_T = (local_T >= 0) & (local_T < real)
        local_T = local_T.masked_fill(~here_T, 0)
        own_T = logits_TV.gather(-1, local_T.unsqueeze(-1)).squeeze(-1).masked_fill(~here_T, 0.0)
        target_T = all_reduce(own_T, group)
        exp_TV = logits_TV.exp_()
        sum_T = all_reduce(exp_TV.sum(-1), group)
        counted_T = targets_T != IGNORED
        exp_TV /= sum_T.unsqueeze(-1)
        ctx.save_for_backward(exp_TV, local_T, here_T, counted_T)
        return ((sum_T.log() - target_T) * counted_T).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities_TV, local_T, here_T, counted_T = ctx.saved_tensors
        grad_TV = probabilities_TV.clone()
        grad_TV.scatter_add_(-1, local_T.unsqueeze(-1), -here_T.to(grad_TV.dtype).unsqueeze(-1))
        grad_TV *= (counted_T * grads[0]).unsqueeze(-1)
        return grad_TV, None, None, None, None
