"""The six pipeline orders: for every rank, which stage works on which micro-batch, slot by slot.

Letters in the comments: P ranks, v chunks a rank, m micro-batches. An order is one rank's list of actions;
None is a slot in which the rank idles by design. The orders are those of torch.distributed.pipelining, which
the tests hold them to, so that a plan made here is a plan that PyTorch executes.

Sources: GPipe arXiv:1811.06965; 1F1B (PipeDream-Flush) and interleaving: Narayanan et al., SC21,
arXiv:2104.04473 §2.2; zero bubble (ZB1P): arXiv:2401.10241; ZB-V: arXiv:2401.10241 §6 and arXiv:2405.15362;
DualPipe: arXiv:2412.19437 §3.2.1; DualPipeV is DualPipe cut in half, so that no stage is kept twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache


class ActionKind(StrEnum):
    """What one slot of an order computes; the values are PyTorch's letters."""

    FORWARD = "F"
    BACKWARD = "B"
    """Full backward: input gradient and weight gradient in one pass."""
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    OVERLAP = "OVERLAP_F_B"
    """A forward and a full backward of another micro-batch, run as one (DualPipeV)."""


@dataclass(frozen=True, slots=True)
class Action:
    """One compute step of one rank.

    An overlapped pair has stage -1 and no micro-batch of its own: its forward and its backward, in that
    order, are its `parts`. Every other action has no parts.
    """

    stage: int
    kind: ActionKind
    micro_batch: int | None
    parts: tuple[Action, ...] = ()

    def __str__(self) -> str:
        """PyTorch's notation: "0F3" is stage 0, forward, micro-batch 3; "(2F1;1B0)OVERLAP_F_B" a pair."""
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind.value}"
        micro_batch = "" if self.micro_batch is None else self.micro_batch
        return f"{self.stage}{self.kind.value}{micro_batch}"

    @property
    def simple_actions(self) -> tuple[Action, ...]:
        """The parts of an overlapped pair, and the action itself otherwise."""
        return self.parts or (self,)


Order = list[Action | None]


@lru_cache(maxsize=2**17)
def _simple(stage: int, kind: ActionKind, micro_batch: int) -> Action:
    """Actions are values, and orders of many pipelines share them."""
    return Action(stage, kind, micro_batch)


class _OrderWriter:
    """One rank's order as it is written. Every stage takes its micro-batches in turn: 0, 1, 2, …"""

    def __init__(self) -> None:
        self.slots: Order = []
        self._next_micro_batch: dict[tuple[int, ActionKind], int] = {}
        self._owed_weight_gradients: list[int] = []  # stages, oldest first

    def idle(self, num_slots: int) -> None:
        self.slots.extend([None] * num_slots)

    def forward(self, stage: int) -> None:
        self.slots.append(self._take(stage, ActionKind.FORWARD))

    def backward(self, stage: int) -> None:
        self.slots.append(self._take_backward(stage))

    def overlap(self, forward_stage: int, backward_stage: int) -> None:
        parts = (self._take(forward_stage, ActionKind.FORWARD), self._take_backward(backward_stage))
        self.slots.append(Action(-1, ActionKind.OVERLAP, None, parts))

    def input_gradient(self, stage: int) -> None:
        self.slots.append(self._take(stage, ActionKind.INPUT_GRADIENT))
        self._owed_weight_gradients.append(stage)

    def weight_gradient(self, stage: int | None = None) -> None:
        """The oldest weight gradient that is owed: of this stage, or of any."""
        stage = self._owed_weight_gradients[0] if stage is None else stage
        self._owed_weight_gradients.remove(stage)
        self.slots.append(self._take(stage, ActionKind.WEIGHT_GRADIENT))

    def all_weight_gradients(self) -> None:
        while self._owed_weight_gradients:
            self.weight_gradient()

    def _take(self, stage: int, kind: ActionKind) -> Action:
        micro_batch = self._next_micro_batch.get((stage, kind), 0)
        self._next_micro_batch[stage, kind] = micro_batch + 1
        return _simple(stage, kind, micro_batch)

    def _take_backward(self, stage: int) -> Action:
        # A full backward takes the turn of both halves: full and split backwards may follow one another.
        inner, weight = (stage, ActionKind.INPUT_GRADIENT), (stage, ActionKind.WEIGHT_GRADIENT)
        micro_batch = self._next_micro_batch.get(inner, 0)
        self._next_micro_batch[inner] = micro_batch + 1
        self._next_micro_batch[weight] = self._next_micro_batch.get(weight, 0) + 1
        return _simple(stage, ActionKind.BACKWARD, micro_batch)


def gpipe(rank: int, num_micro_batches: int) -> Order:
    """All forwards, then all backwards (GPipe, arXiv:1811.06965, fig. 2c)."""
    order = _OrderWriter()
    for _ in range(num_micro_batches):
        order.forward(rank)
    for _ in range(num_micro_batches):
        order.backward(rank)
    return order.slots


def one_forward_one_backward(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """P-1-rank forwards, then forward and backward in turn, then what is left (arXiv:2104.04473 §2.2.1). With
    fewer micro-batches all of them go forward first (Megatron Core, pipeline_parallel/schedules.py)."""
    order = _OrderWriter()
    num_warmup = min(num_ranks - 1 - rank, num_micro_batches)
    for _ in range(num_warmup):
        order.forward(rank)
    for _ in range(num_micro_batches - num_warmup):
        order.forward(rank)
        order.backward(rank)
    for _ in range(num_warmup):
        order.backward(rank)
    return order.slots


def num_rounds(num_ranks: int, num_micro_batches: int) -> int:
    """Rounds of interleaving: in each, a rank runs m/rounds micro-batches through one chunk after the other.

    A round has P micro-batches in the paper (arXiv:2104.04473 §2.2.2, m a multiple of P). PyTorch takes ⌊m/P⌋
    rounds, at least one: the same there, and longer rounds elsewhere, provided that they come out equal.
    """
    return max(1, num_micro_batches // num_ranks)


def interleaved(
    rank: int, num_ranks: int, chunks_per_rank: int, num_micro_batches: int, *, zero_bubble: bool
) -> Order:
    """Interleaved 1F1B (arXiv:2104.04473 §2.2.2), or ZB1P over chunks (arXiv:2401.10241).

    The warm-up is v-1 rounds and two forwards per hop to the last rank. With `zero_bubble` it is one forward
    per hop, backwards are split, and a rank's weight gradients run `rank` steps behind its input gradients:
    they fill the wait at the end. Those orders are complete after `delay_early_forwards`.
    """
    order = _OrderWriter()
    per_round = num_micro_batches // num_rounds(num_ranks, num_micro_batches)
    num_steps = chunks_per_rank * num_micro_batches  # forwards of this rank, and as many backwards
    hops = num_ranks - 1 - rank
    num_warmup = min((chunks_per_rank - 1) * per_round + (1 if zero_bubble else 2) * hops, num_steps)
    order.idle(rank)
    for step in range(num_warmup):
        order.forward(step // per_round % chunks_per_rank * num_ranks + rank)
    if num_warmup:  # wait for the first gradient to travel back to this rank
        first_backward = chunks_per_rank * num_ranks + 2 * hops
        order.idle(hops if zero_bubble else max(0, first_backward - num_warmup - rank))
    for step in range(num_steps):
        if num_warmup + step < num_steps:
            order.forward((num_warmup + step) // per_round % chunks_per_rank * num_ranks + rank)
        elif not zero_bubble:
            order.idle(1)  # the slot of the forwards that other ranks are still doing
        stage = (chunks_per_rank - 1 - step // per_round % chunks_per_rank) * num_ranks + rank
        if not zero_bubble:
            order.backward(stage)
            continue
        order.input_gradient(stage)
        if step >= rank:
            order.weight_gradient()
    order.all_weight_gradients()
    return order.slots


def delay_early_forwards(orders: Sequence[Order]) -> list[Order]:
    """Insert an idle slot wherever a forward would come no later than the same forward one stage earlier.

    All ranks advance one slot at a time. This matters where m is below P: the first rank then turns to its
    next chunk before the last rank is done with the one before. Backwards stay where they are, as in PyTorch.
    """
    delayed: list[Order] = [[] for _ in orders]
    position = [0] * len(orders)
    forwarded: set[tuple[int, int | None]] = set()
    active = [rank for rank, order in enumerate(orders) if order]
    while active:
        forwarded_now: list[tuple[int, int | None]] = []
        for rank in active:
            action = orders[rank][position[rank]]
            if action is not None and action.kind is ActionKind.FORWARD:
                if action.stage > 0 and (action.stage - 1, action.micro_batch) not in forwarded:
                    delayed[rank].append(None)
                    continue
                forwarded_now.append((action.stage, action.micro_batch))
            delayed[rank].append(action)
            position[rank] += 1
        forwarded.update(forwarded_now)
        active = [rank for rank in active if position[rank] < len(orders[rank])]
    return delayed


def zero_bubble_v(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """ZB-V: two chunks a rank laid out as a V (arXiv:2401.10241 §6, arXiv:2405.15362).

    No rank idles between its first and last action where F, I and W take equal time and m ≥ 2P-1. With fewer
    micro-batches the order is that of 2P-1 with the surplus ones left out: their slots idle.
    """
    order = _OrderWriter()
    down, up = rank, 2 * num_ranks - 1 - rank  # the stages on the V's way down and back up
    num_full = max(num_micro_batches, 2 * num_ranks - 1)
    order.idle(rank)
    for _ in range(2 * (num_ranks - rank) - 1):
        order.forward(down)
    for _ in range(rank):
        order.forward(up)
        order.forward(down)
    for _ in range(num_ranks - rank):
        _forward_then_split_backward(order, up, up)
    num_forwards_left = num_full - (2 * num_ranks - rank - 1)
    for step in range(num_full - num_ranks):  # steady
        _forward_then_split_backward(order, down if step < num_forwards_left else None, down)
        _forward_then_split_backward(order, up, up)
    for _ in range(rank):
        order.input_gradient(down)
        order.input_gradient(up)
    for _ in range(num_ranks - rank):
        order.input_gradient(down)
        order.weight_gradient(down)
    for stage in (up, down):
        for _ in range(rank):
            order.weight_gradient(stage)
    return [None if _is_beyond(action, num_micro_batches) else action for action in order.slots]


def _is_beyond(action: Action | None, num_micro_batches: int) -> bool:
    return action is not None and action.micro_batch is not None and action.micro_batch >= num_micro_batches


def _forward_then_split_backward(order: _OrderWriter, forward_stage: int | None, backward_stage: int) -> None:
    if forward_stage is not None:
        order.forward(forward_stage)
    order.input_gradient(backward_stage)
    order.weight_gradient(backward_stage)


def dual_pipe_v(rank: int, num_ranks: int, num_micro_batches: int) -> Order:
    """DualPipeV: forwards overlapped with another micro-batch's backward (arXiv:2412.19437 §3.2.1, fig. 5).

    DualPipe keeps two copies of every stage; cut in half, each rank keeps stages `rank` and 2P-1-rank once.
    Needs m ≥ 2P. The steps are numbered as in the authors' code (github.com/deepseek-ai/DualPipe).
    """
    order = _OrderWriter()
    down, up = rank, 2 * num_ranks - 1 - rank
    hops = num_ranks - 1 - rank
    for _ in range(2 * hops):  # 1
        order.forward(down)
    for _ in range(rank + 1):  # 2
        order.forward(down)
        order.forward(up)
    for _ in range(hops):  # 3: weight gradients fill the wait for the next forward
        order.input_gradient(up)
        order.weight_gradient(up)
        order.forward(up)
    for step in range(num_micro_batches - 2 * num_ranks + rank + 1):  # 4: the main part
        if step == 0 and hops == 0:
            order.forward(down)  # the turn of the V: apart, the backward's input is there earlier
            order.backward(up)
        else:
            order.overlap(down, up)
        order.overlap(up, down)
    for _ in range(hops):  # 5
        order.backward(up)
        order.overlap(up, down)
    for step in range(2 * (rank + 1)):  # 6: the second half splits its backwards
        stage = up if step % 2 == 0 else down
        if step <= rank:
            order.backward(stage)
        else:
            order.input_gradient(stage)
    for _ in range(hops):  # 7
        order.weight_gradient()
        order.input_gradient(down)
    order.all_weight_gradients()  # 8
    return order.slots
