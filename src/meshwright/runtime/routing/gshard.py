"""GShard's top-2 gate (arXiv:2006.16668, algorithm 1) as FairSeq MoE and fairscale run it.

They differ in the capacity and in the loss; `GShard` says which is meant. Each token's first expert is the
best; the second is sampled by default. An expert serves all first choices before any second choice, and what
exceeds its capacity is dropped. A token both of whose experts dropped it passes by on the residual alone.

Where there is padding, S counts the valid tokens; fairseq's capacity counts padding too.

Shape letters: S tokens of this rank, E experts, N = 2S copies: all first choices, then all second ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meshwright.runtime.routing.capacity import ceil, num_valid, within
from meshwright.runtime.routing.decision import Decision


@dataclass(frozen=True)
class GShard:
    """What the top-2 gate leaves open; the defaults are those of fairseq's branch `moe`.

    variant: `fairseq` has capacity 2·ceil(S/E), `fairscale` 2·S//E; their losses differ too (`losses`).
    second_expert_policy: `sampling` adds Gumbel noise to the logits and takes the best but the first, which
        samples from the softmax of the others; `all` takes the second best; `random` takes the second best
        and passes it over unless 2·g2 exceeds a uniform draw.
    normalize_before_dropping: divide both gates by their sum before dropping rather than after. After, the
        expert that alone keeps a token has weight 1.
    batch_prioritized: serve tokens by their best gate, highest first, rather than by position.
    eval_capacity_fraction, eval_capacity_length: in evaluation an expert takes ceil(fraction·S) tokens, or
        ceil(fraction·length) when a length is given (fairseq's branch `nllb` has that); a fraction of 0 or
        below keeps training's capacity.
        fairscale knows neither and always has training's.
    """

    variant: Literal["fairseq", "fairscale"] = "fairseq"
    second_expert_policy: Literal["sampling", "random", "all"] = "sampling"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    eval_capacity_fraction: float = 0.25
    eval_capacity_length: int | None = None

    def capacity(self, num_tokens: int | Tensor, num_experts: int, training: bool = True) -> int | Tensor:
        """Copies that one expert takes from this rank, which has `num_tokens` valid tokens."""
        if self.variant == "fairscale":
            return 2 * num_tokens // num_experts
        if training or self.eval_capacity_fraction <= 0:
            return 2 * -(-num_tokens // num_experts)
        tokens = num_tokens if self.eval_capacity_length is None else self.eval_capacity_length
        if isinstance(tokens, Tensor):
            tokens = tokens.double()
        return ceil(self.eval_capacity_fraction * tokens)


def gumbel(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise −log(−log u) on the generator's device, draw for draw what
    torch.distributions.Gumbel(0, 1) gives."""
    u = torch.rand(shape, dtype=dtype, device=generator.device, generator=generator)
    info = torch.finfo(dtype)
    return -torch.log(-torch.log(info.tiny + u * ((1.0 - info.eps) - info.tiny)))


def decide(
    logits_SE: Tensor,
    gates_SE: Tensor,
    gshard: GShard,
    valid_S: Tensor | None,
    generator: torch.Generator | None,
    training: bool,
) -> Decision:
    """Both experts of each token and which copies stay within capacity.

    Raises ValueError when the policy draws and no generator was given.
    """
    num_tokens, num_experts = gates_SE.shape
    choices_S2 = _choices(logits_SE, gates_SE, gshard, generator)
    asked_S2 = _asked(gates_SE, choices_S2, gshard, valid_S, generator)
    limit = gshard.capacity(num_valid(num_tokens, valid_S), num_experts, training)
    order_N = None
    if gshard.batch_prioritized:
        order_S = gates_SE.amax(dim=1).argsort(stable=True, descending=True)
        order_N = torch.cat((order_S, order_S + num_tokens))
    asked_N = None if asked_S2 is None else asked_S2.t().flatten()
    kept_N = within(choices_S2.t().flatten(), num_experts, limit, order_N, asked_N)
    return Decision(choices_S2, kept_N.view(2, num_tokens).t().contiguous(), asked_S2)


def _choices(
    logits_SE: Tensor, gates_SE: Tensor, gshard: GShard, generator: torch.Generator | None
) -> Tensor:
    first_S1 = gates_SE.argmax(dim=1, keepdim=True)
    if gshard.second_expert_policy == "sampling":
        noise_SE = gumbel(logits_SE.shape, logits_SE.dtype, _needed(generator, gshard))
        logits_SE = logits_SE + noise_SE
    second_S1 = logits_SE.scatter(1, first_S1, float("-inf")).argmax(dim=1, keepdim=True)
    return torch.cat((first_S1, second_S1), dim=1)


def _asked(
    gates_SE: Tensor,
    choices_S2: Tensor,
    gshard: GShard,
    valid_S: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Copies that ask for a place, [S, 2] bool: not padding, and not second experts passed over."""
    valid_S2 = None if valid_S is None else valid_S[:, None].expand(-1, 2).contiguous()
    if gshard.second_expert_policy != "random":
        return valid_S2
    generator = _needed(generator, gshard)
    gates_S2 = gates_SE.gather(1, choices_S2)
    if gshard.normalize_before_dropping:
        gates_S2 = _normalized(gates_S2)
    second_S = gates_S2[:, 1]
    uniform_S = torch.rand(second_S.shape, dtype=second_S.dtype, device=generator.device, generator=generator)
    drawn_S = 2 * second_S > uniform_S
    asked_S2 = torch.stack((torch.ones_like(drawn_S), drawn_S), dim=1)
    return asked_S2 if valid_S2 is None else asked_S2 & valid_S2


def combine_weights(gates_SE: Tensor, decision: Decision, gshard: GShard) -> Tensor:
    """g / max(g1 + g2, eps) of the two chosen, [S, 2]: over those that were kept, or before dropping."""
    gates_S2 = gates_SE.gather(1, decision.choices)
    if gshard.normalize_before_dropping:
        gates_S2 = _normalized(gates_S2)
    if decision.kept is not None:
        gates_S2 = gates_S2.masked_fill(~decision.kept, 0.0)
    return gates_S2 if gshard.normalize_before_dropping else _normalized(gates_S2)


def _normalized(gates_S2: Tensor) -> Tensor:
    total_S1 = gates_S2.sum(dim=1, keepdim=True)
    return gates_S2 / total_S1.clamp(min=torch.finfo(gates_S2.dtype).eps)


def _needed(generator: torch.Generator | None, gshard: GShard) -> torch.Generator:
    if generator is None:
        raise ValueError(
            f"second_expert_policy {gshard.second_expert_policy!r} draws: give route a generator"
        )
    return generator
