"""Mistakes that training over many ranks is prone to, each put in at one place; the comparison finds them.

Each function changes the process that calls it, for good: ranks call them, and end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from layouts import STEPS, Case, _case
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from meshwright.runtime import build, moe, store
from meshwright.runtime.buckets import Bucket
from meshwright.runtime.shares import Partial
from meshwright.runtime.store import Store


def _after(owner: type, name: str, more: Callable[..., None]) -> None:
    """Do more at the end of a method."""
    method = getattr(owner, name)

    def changed(self: Any, *args: Any, **options: Any) -> Any:
        result = method(self, *args, **options)
        more(self)
        return result

    setattr(owner, name, changed)


def double_expert_gradients() -> None:
    def double(self: Store) -> None:
        for share in self.shares:
            if share.held.param.is_expert:
                share.gradient.mul_(2)

    _after(Store, "reduce_gradients", double)


def keep_partial_sums() -> None:
    Bucket.add_partial_sums = lambda self: None  # type: ignore[method-assign]


def average_over_data_ranks() -> None:
    def average(self: Bucket) -> None:
        if self.group is not None:
            self.own_gradients.div_(self.group.size())

    _after(Bucket, "reduce", average)


def _leave_out(axis: str, word: str) -> None:
    partial_of = store._dense_partial

    def changed(held: Sequence[Any], mesh: Any, sequence_parallel: bool) -> Partial:
        found = partial_of(held, mesh, sequence_parallel)
        return [
            (name, frozenset(n for n in names if word not in n) if name == axis else names)
            for name, names in found
        ]

    store._dense_partial = changed


def forget_the_routers_sum() -> None:
    _leave_out("tp", "router")


def forget_copies_of_heads() -> None:
    _leave_out("kv_copies", "")


def forget_sums_over_expert_tensor_ranks() -> None:
    store._expert_partial = lambda held: []


def forget_the_other_end_of_the_table() -> None:
    build._splits_table = lambda plan, stages: False


def lose_an_experts_tokens() -> None:
    dispatch = moe.dispatch

    def losing(setting: Any, x: Tensor, choices: Tensor, *rest: Any) -> Tensor:
        return dispatch(setting, x, choices.masked_fill(choices == 3, -1), *rest)

    moe.dispatch = losing


def balance_each_ranks_tokens_alone() -> None:
    moe.all_reduce = lambda x, group: x


def let_fsdp_average() -> None:
    for name in ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms"):
        setattr(FSDPModule, name, lambda self, value: None)


def leave_experts_out_of_the_norm() -> None:
    def without(self: Store) -> None:
        self.has_experts = False

    _after(Store, "__init__", without)


def keep_updates_to_oneself() -> None:
    Bucket.publish = lambda self: None  # type: ignore[method-assign]


@dataclass(frozen=True)
class Mutation:
    """A mistake in a layout that it concerns, and the errors that must be beyond their limits."""

    mutate: Callable[[], None]
    case: Case
    found: tuple[str, ...]
    steps: int = 2

    def __str__(self) -> str:
        return self.mutate.__name__.replace("_", " ")


MUTATIONS = (
    Mutation(
        double_expert_gradients,
        _case("gated", "dp2 ep2", "z1", "mb2"),
        ("gradient", "norm", "weight"),
        STEPS,
    ),
    Mutation(let_fsdp_average, _case("gated", "dp4 ep2", "z3", "mb2"), ("gradient", "norm")),
    Mutation(
        leave_experts_out_of_the_norm,
        _case("gated", "dp2 ep2", "z1", "mb2"),
        ("norm", "weight"),
        STEPS,
    ),
    Mutation(average_over_data_ranks, _case("gated", "dp2", "z0", "mb2"), ("gradient", "norm")),
    Mutation(keep_updates_to_oneself, _case("gated", "dp2 ep2", "z1", "mb2"), ("loss", "weight"), STEPS),
    Mutation(keep_partial_sums, _case("gated", "tp2", "z0", "mb8"), ("gradient", "norm")),
    Mutation(forget_the_routers_sum, _case("gated", "tp2", "z0", "mb8"), ("gradient",)),
    Mutation(forget_copies_of_heads, _case("dense", "tp4", "z0", "mb8", "nosp"), ("gradient",)),
    Mutation(forget_sums_over_expert_tensor_ranks, _case("plain", "tp2", "z0", "mb8"), ("gradient",)),
    Mutation(forget_the_other_end_of_the_table, _case("tied", "pp2", "z0", "mb2"), ("gradient",)),
    Mutation(lose_an_experts_tokens, _case("gated", "dp2 ep2", "z1", "mb2"), ("loss", "gradient")),
    Mutation(balance_each_ranks_tokens_alone, _case("balanced", "tp2", "z0", "mb8"), ("gradient",)),
)
