"""How evenly experts are used and how much is dropped, as counts that add up.

Counts of ranks and micro-batches are added, and only then turned into shares. Nothing here waits for the
device; reading a figure does.

Shape letters: T tokens of this rank, k choices of a token, E experts; leading dims, such as layers, are
allowed after counting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.runtime.routing.capacity import count
from meshwright.runtime.routing.decision import Routing

BALANCE_SHARE = 0.2  # of the experts: fairseq branch `moe`, top2gate.py, SAMPLE_FRACTION


@dataclass(frozen=True)
class RoutingCounts:
    """What routing did to some tokens; `+` joins disjoint sets of them.

    first, second: [..., E] int64, valid tokens by their first and second choice, dropped or not.
    offered: [..., E] int64, copies that asked for a place at each expert: the load before dropping.
    tokens, offered_second, dropped_first, dropped_second, dropped: [...] int64; the last over all choices.
    entropy_sum: [...] FP64, Σ_t −Σ_i p_it·ln p_it.
    """

    first: Tensor
    second: Tensor
    offered: Tensor
    tokens: Tensor
    offered_second: Tensor
    dropped_first: Tensor
    dropped_second: Tensor
    dropped: Tensor
    entropy_sum: Tensor

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        return RoutingCounts(*(mine + theirs for mine, theirs in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> tuple[Tensor, ...]:
        return (*self._by_expert(), *self._totals())

    def _by_expert(self) -> tuple[Tensor, ...]:
        return self.first, self.second, self.offered

    def _totals(self) -> tuple[Tensor, ...]:
        dropped = (self.dropped_first, self.dropped_second, self.dropped)
        return (self.tokens, self.offered_second, *dropped, self.entropy_sum)

    def packed(self) -> Tensor:
        """All of it as one FP64 tensor [..., 3·E + 6], exact up to 2⁵³, to be added over ranks at once."""
        totals = torch.stack([total.double() for total in self._totals()], dim=-1)
        return torch.cat([*(counts.double() for counts in self._by_expert()), totals], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> RoutingCounts:
        """What `packed` wrote, or a sum of such tensors."""
        num_experts = (packed.shape[-1] - 6) // 3
        counts = packed[..., : 3 * num_experts].long().chunk(3, dim=-1)
        totals = packed[..., 3 * num_experts :].unbind(-1)
        parts = [*counts, *(total.long() for total in totals[:-1]), totals[-1]]
        return cls(*parts)


@torch.no_grad()
def routing_counts(routing: Routing) -> RoutingCounts:
    """Counts of one micro-batch's valid tokens on this rank."""
    choices_Tk, kept_Tk, asked_Tk = routing.choices, routing.kept, routing.decision.offered
    num_experts, valid_T = routing.num_experts, routing.valid
    first_E = count(choices_Tk[:, 0], num_experts, valid_T)
    has_second = choices_Tk.shape[1] > 1
    second_E = count(choices_Tk[:, 1], num_experts, valid_T) if has_second else torch.zeros_like(first_E)
    asked_N = None if asked_Tk is None else asked_Tk.flatten()
    offered_E = count(choices_Tk.flatten(), num_experts, asked_N)
    asked_k = first_E.sum().expand(choices_Tk.shape[1]) if asked_Tk is None else asked_Tk.sum(dim=0)
    kept_k = asked_k if kept_Tk is None else kept_Tk.sum(dim=0)
    dropped_k = asked_k - kept_k
    nothing = torch.zeros_like(dropped_k[0])
    entropy_T = torch.special.entr(routing.probabilities).sum(dim=-1, dtype=torch.float64)
    return RoutingCounts(
        first=first_E,
        second=second_E,
        offered=offered_E,
        tokens=first_E.sum(),
        offered_second=asked_k[1] if has_second else nothing,
        dropped_first=dropped_k[0],
        dropped_second=dropped_k[1] if has_second else nothing,
        dropped=dropped_k.sum(),
        entropy_sum=entropy_T.sum() if valid_T is None else entropy_T.masked_fill(~valid_T, 0.0).sum(),
    )


def routing_log(counts: RoutingCounts) -> dict[str, Tensor]:
    """Figures to log, each [...] FP64 on the counts' device: fairseq's keys and two of our own.

    As fairseq branch `moe`, top2gate.py, computes them for one micro-batch: `overflow_expert1/2` in percent
    of the first (second) choices that asked for a place; `entropy_gating` in nats, the mean over tokens;
    `expert1_balance_top/bottom` in percent of the tokens, those whose first choice is among the most (least)
    chosen fifth of the experts; `unused_expert1_count`; the same for second choices. Of added-up counts the
    figures are those of all tokens together, where fairseq averages the figures of micro-batches. fairseq
    counts padding in entropy and balance; here it counts nowhere.

    `load_max_over_mean` is the most loaded expert over the mean, before dropping; `dropped_fraction` the
    share of copies dropped. Without tokens all are 0, but that all experts are unused.
    """
    first, second = counts.first.double(), counts.second.double()
    offered = counts.offered.double()
    copies = _at_least_one(offered.sum(dim=-1))
    figures = {
        "overflow_expert1": 100 * counts.dropped_first / _at_least_one(counts.tokens),
        "overflow_expert2": 100 * counts.dropped_second / _at_least_one(counts.offered_second),
        "entropy_gating": counts.entropy_sum / _at_least_one(counts.tokens),
    }
    for number, chosen in ((1, first), (2, second)):
        top, bottom = _fifths(chosen, _at_least_one(counts.tokens))
        figures[f"expert{number}_balance_top"] = top
        figures[f"expert{number}_balance_bottom"] = bottom
        figures[f"unused_expert{number}_count"] = (chosen == 0).sum(dim=-1).double()
    figures["load_max_over_mean"] = offered.amax(dim=-1) * offered.shape[-1] / copies
    figures["dropped_fraction"] = counts.dropped / copies
    return figures


def _fifths(chosen_E: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Percent of the tokens at the most and at the least chosen fifth of the experts, rounded up."""
    share_E = (100 * chosen_E / tokens[..., None]).sort(dim=-1, descending=True).values
    size = max(math.ceil(chosen_E.shape[-1] * BALANCE_SHARE), 1)
    return share_E[..., :size].sum(dim=-1), share_E[..., -size:].sum(dim=-1)


def _at_least_one(total: Tensor) -> Tensor:
    return total.double().clamp(min=1.0)
