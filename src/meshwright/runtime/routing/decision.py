"""What a router decided, and what it hands on.

Shape letters: T tokens of this rank, k choices of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from meshwright.runtime.routing.scores import probabilities

RouterType = Literal["softmax", "sigmoid", "gshard_top2"]


@dataclass(frozen=True)
class Decision:
    """Everything discrete that routing decided; given back to `route` it decides nothing anew.

    Recomputed activations are routed with the first run's decision: scores that are nearly tied could
    otherwise choose other experts the second time, and a sampled second expert would.

    choices: [T, k] int64, the experts of each token, all different, in [0, E). Rows of padding mean nothing.
    kept: [T, k] bool, the copies that experts process; None when every copy is.
    offered: [T, k] bool, the copies that asked for a place, dropped or not: without padding and without the
        second experts that GShard's `random` policy passed over; None when every copy asked.
    counted: [T, k] int64, the choices that a balance loss counts where they are not `choices`: the best by
        score alone (DeepSeek-V3, arXiv:2412.19437 eq. 18, which knows no correction bias); None otherwise.
    """

    choices: Tensor
    kept: Tensor | None = None
    offered: Tensor | None = None
    counted: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """The experts of each token, what each counts for, and what losses and statistics read.

    weights: [T, k] FP32, differentiable; 0 where a copy is dropped or the token is padding.
    scores: [T, E] FP32, differentiable: softmax or sigmoid of the logits.
    valid: [T] bool, False for padding; None when every token is real.
    """

    weights: Tensor
    decision: Decision
    scores: Tensor
    type: RouterType
    valid: Tensor | None = None

    @property
    def choices(self) -> Tensor:
        """[T, k] int64: see `Decision`."""
        return self.decision.choices

    @property
    def kept(self) -> Tensor | None:
        """[T, k] bool or None: see `Decision`."""
        return self.decision.kept

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[1]

    @property
    def probabilities(self) -> Tensor:
        """[T, E]: scores that sum to 1 for each token. Computed at each call under sigmoid."""
        return probabilities(self.scores, self.type)
