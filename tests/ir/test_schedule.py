"""Pipeline orders: equal to PyTorch's, executable, and as costly as the papers say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.ir.schedule import (
    Action,
    ActionKind,
    Schedule,
    activation_peaks,
    bubble_slots,
    build_schedule,
    check,
    default_chunks,
    live_at_peak,
    peak_in_flight,
    rank_of,
    require_buildable,
    run_in_order,
    stage_of,
)
from meshwright.policy import SCHEDULES, V_SCHEDULES, ScheduleName

SINGLE = ("GPipe", "1F1B")
INTERLEAVED = ("Interleaved1F1B", "InterleavedZeroBubble")
NUM_MICRO_BATCHES = (*range(1, 19), 20, 21, 23, 24, 31, 32, 33, 40)


# --- PyTorch as the outside truth ---


@pytest.fixture(scope="module")
def torch_schedules() -> Any:
    return pytest.importorskip("torch.distributed.pipelining.schedules")


def fake_stage(num_ranks: int, chunks_per_rank: int, rank: int = 0) -> Any:
    """As much of a PipelineStage as the orders look at; no process group, no model."""
    num_stages = num_ranks * chunks_per_rank
    return SimpleNamespace(
        num_stages=num_stages,
        group_size=num_ranks,
        group_rank=rank,
        stage_index=rank,
        is_first=rank == 0,
        is_last=rank == num_stages - 1,
        submod=None,
    )


def torch_orders(torch_schedules: Any, name: str, num_ranks: int, chunks: int, num_micro_batches: int) -> Any:
    """PyTorch's compute-only orders as text, by rank, or None where it refuses the combination."""
    schedule_class = torch_schedules.get_schedule_class(name)
    stages = [fake_stage(num_ranks, chunks) for _ in range(chunks)]
    try:
        built = schedule_class(stages[0] if name in SINGLE else stages, num_micro_batches)
    except ValueError:
        return None
    return [
        [
            action and str(action)
            for action in built.pipeline_order[rank]
            if action is None or action.is_compute_op
        ]
        for rank in range(num_ranks)
    ]


def as_text(schedule: Schedule) -> list[list[str | None]]:
    return [[action and str(action) for action in order] for order in schedule.orders]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_orders_and_refusals_equal_pytorch(torch_schedules: Any, name: ScheduleName, num_ranks: int) -> None:
    num_compared = 0
    for chunks in (1,) if name in SINGLE else (1, 2, 3, 4):
        for num_micro_batches in NUM_MICRO_BATCHES:
            expected = torch_orders(torch_schedules, name, num_ranks, chunks, num_micro_batches)
            if expected is None and name == "1F1B":
                assert num_micro_batches < num_ranks  # which Megatron and DeepSpeed run
                continue
            if expected is None:
                with pytest.raises(InputError):
                    build_schedule(name, num_ranks, num_micro_batches, chunks)
                continue
            if name == "1F1B":
                expected[-1] = renumber_last_1f1b_rank(expected[-1], num_ranks - 1, num_micro_batches)
            schedule = build_schedule(name, num_ranks, num_micro_batches, chunks)
            assert as_text(schedule) == expected, (chunks, num_micro_batches)
            num_compared += 1
    assert num_compared >= 9


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 1), (4, 1), (4, 2), (4, 3), (8, 3)])
def test_1f1b_with_fewer_micro_batches_than_ranks(num_ranks: int, num_micro_batches: int) -> None:
    """Megatron Core, pipeline_parallel/schedules.py: min(P − 1 − r, m) forwards, then in turn. Ranks idle
    for (P − 1)/(m + P − 1) of the time, as with more micro-batches."""
    schedule = build_schedule("1F1B", num_ranks, num_micro_batches)
    for rank, order in enumerate(schedule.orders):
        done = [str(action) for action in order if action is not None]
        first = min(num_ranks - 1 - rank, num_micro_batches)
        rest = num_micro_batches - first
        turns = [text for i in range(rest) for text in (f"{rank}F{first + i}", f"{rank}B{i}")]
        last = [f"{rank}B{i}" for i in range(rest, num_micro_batches)]
        assert done == [f"{rank}F{i}" for i in range(first)] + turns + last
    idle = (num_ranks - 1) / (num_micro_batches + num_ranks - 1)
    assert bubble_slots(schedule) == pytest.approx([idle] * num_ranks)


def renumber_last_1f1b_rank(order: list[str], stage: int, num_micro_batches: int) -> list[str]:
    """PyTorch 2.13 lists the last rank's forwards as micro-batches 1…m; what it executes is 0…m-1.

    The execution is compared in `test_single_stage_orders_equal_what_pytorch_executes`.
    """
    forwards = [f"{stage}F{micro_batch}" for micro_batch in range(num_micro_batches)]
    shift = 1 if f"{stage}F{num_micro_batches}" in order else 0
    assert [text for text in order if "F" in text] == [
        f"{stage}F{micro_batch + shift}" for micro_batch in range(num_micro_batches)
    ]
    remaining = iter(forwards)
    return [next(remaining) if "F" in text else text for text in order]


class RecordingStage(SimpleNamespace):
    """A stage without neighbours that writes down what the schedule makes it do."""

    def forward_one_chunk(self, micro_batch: int, *args: Any, **kwargs: Any) -> None:
        self.executed.append(f"{self.stage_index}F{micro_batch}")

    def backward_one_chunk(self, micro_batch: int, **kwargs: Any) -> None:
        self.executed.append(f"{self.stage_index}B{micro_batch}")

    def no_communication(self, micro_batch: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_communication

    def perform_reduce_grad(self, scale: int) -> None: ...


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches"), [(1, 1), (1, 3), (2, 2), (3, 8), (4, 4), (4, 11)]
)
def test_single_stage_orders_equal_what_pytorch_executes(
    torch_schedules: Any, name: ScheduleName, num_ranks: int, num_micro_batches: int
) -> None:
    executed = []
    for rank in range(num_ranks):
        stage = RecordingStage(**vars(fake_stage(num_ranks, 1, rank)), executed=[])
        runner = torch_schedules.get_schedule_class(name)(stage, num_micro_batches)
        runner._initialize_stage = lambda *args: None
        runner._step_microbatches()
        executed.append(stage.executed)
    assert as_text(build_schedule(name, num_ranks, num_micro_batches)) == executed


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_placement_equals_pytorch(name: ScheduleName, num_ranks: int) -> None:
    utils = pytest.importorskip("torch.distributed.pipelining._utils")
    style = "v" if name in V_SCHEDULES else "loop"
    for chunks in (1,) if name in SINGLE else (2,) if name in V_SCHEDULES else (1, 2, 3, 4):
        expected = utils.generate_rank_to_stage_mapping(num_ranks, num_ranks * chunks, style)
        schedule = build_schedule(name, num_ranks, 2 * num_ranks, chunks)
        assert dict(enumerate(map(list, schedule.stages_of_rank))) == expected
        assert schedule.num_stages == num_ranks * chunks


# --- what is refused, and in which words ---


@pytest.mark.parametrize(
    ("arguments", "key", "value", "nearest"),
    [
        (("GPipe", 0, 4), "layout.pp", 0, (1,)),
        (("GPipe", 4, 0), "workload.global_batch_size", 0, (1,)),
        (("GPipe", 4, 4, 2), "layout.vpp", 2, (1,)),
        (("1F1B", 4, 8, 2), "layout.vpp", 2, (1,)),
        (("Interleaved1F1B", 4, 8, 0), "layout.vpp", 0, (1, 2)),
        (("Interleaved1F1B", 4, 9, 2), "workload.global_batch_size", 9, (8, 10)),
        (("InterleavedZeroBubble", 4, 19), "workload.global_batch_size", 19, (16, 20)),
        (("InterleavedZeroBubble", 4, 0), "workload.global_batch_size", 0, (1,)),
        (("ZBVZeroBubble", 4, 8, 1), "layout.vpp", 1, (2,)),
        (("DualPipeV", 4, 8, 3), "layout.vpp", 3, (2,)),
        (("DualPipeV", 4, 7), "workload.global_batch_size", 7, (8,)),
        (("Chimera", 4, 8), "policy.schedule", "Chimera", SCHEDULES),
    ],
)
def test_refusals_name_key_value_and_nearest(
    arguments: tuple[Any, ...], key: str, value: object, nearest: tuple[object, ...]
) -> None:
    for function in (build_schedule, require_buildable):
        with pytest.raises(InputError) as error:
            function(*arguments)
        assert (error.value.key, error.value.value, error.value.nearest) == (key, value, nearest)


names = st.sampled_from(SCHEDULES)
small_ranks = st.integers(1, 6)
small_counts = st.integers(1, 30)


@given(names, st.integers(1, 20), st.integers(-2, 200))
def test_nearest_micro_batch_counts_are_accepted(
    name: ScheduleName, num_ranks: int, num_micro_batches: int
) -> None:
    try:
        require_buildable(name, num_ranks, num_micro_batches)
    except InputError as error:
        for nearest in error.nearest:
            assert isinstance(nearest, int)
            require_buildable(name, num_ranks, nearest)
            between = range(min(nearest, num_micro_batches) + 1, max(nearest, num_micro_batches))
            for closer in between:
                with pytest.raises(InputError):
                    require_buildable(name, num_ranks, closer)


def test_stage_of() -> None:
    assert [stage_of("Interleaved1F1B", 1, chunk, 4) for chunk in range(3)] == [1, 5, 9]
    assert [stage_of("ZBVZeroBubble", rank, 1, 4) for rank in range(4)] == [7, 6, 5, 4]
    assert stage_of("DualPipeV", 3, 0, 4) == 3
    for name, rank, chunk in (("GPipe", 4, 0), ("GPipe", -1, 0), ("1F1B", 0, -1), ("DualPipeV", 0, 2)):
        with pytest.raises(ValueError, match="has no chunk"):
            stage_of(name, rank, chunk, 4)  # type: ignore[arg-type]


@given(st.sampled_from(SCHEDULES), st.integers(1, 9))
def test_rank_of_undoes_stage_of(name: ScheduleName, num_ranks: int) -> None:
    for chunk in range(default_chunks(name)):
        for rank in range(num_ranks):
            assert rank_of(name, stage_of(name, rank, chunk, num_ranks), num_ranks) == rank


def test_equal_pipelines_share_one_schedule() -> None:
    assert build_schedule("Interleaved1F1B", 4, 8) is build_schedule("Interleaved1F1B", 4, 8, 2)


def test_default_chunks() -> None:
    assert [default_chunks(name) for name in SCHEDULES] == [1, 1, 2, 2, 2, 2]


def test_actions_print_in_pytorch_notation(torch_schedules: Any) -> None:
    forward, backward = Action(2, ActionKind.FORWARD, 1), Action(1, ActionKind.BACKWARD, 0)
    pair = Action(-1, ActionKind.OVERLAP, None, (forward, backward))
    assert str(forward) == "2F1"
    assert str(pair) == "(2F1;1B0)OVERLAP_F_B"
    for action in (forward, backward, pair, Action(0, ActionKind.WEIGHT_GRADIENT, 12)):
        assert str(torch_schedules._Action.from_str(str(action))) == str(action)


# --- check ---


@settings(deadline=None)
@given(names, small_ranks, small_counts, st.integers(1, 4))
def test_every_buildable_schedule_is_executable(
    name: ScheduleName, num_ranks: int, num_micro_batches: int, chunks: int
) -> None:
    try:
        schedule = build_schedule(name, num_ranks, num_micro_batches, chunks)
    except InputError:
        return
    check(schedule)


def with_order(schedule: Schedule, rank: int, order: list[Action | None]) -> Schedule:
    orders = list(schedule.orders)
    orders[rank] = tuple(order)
    return replace(schedule, orders=tuple(orders))


def actions_by_place(schedule: Schedule) -> Iterator[tuple[int, int, Action]]:
    for rank, order in enumerate(schedule.orders):
        for slot, action in enumerate(order):
            if action is not None:
                yield rank, slot, action


def mutants(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    for rank, slot, action in actions_by_place(schedule):
        order = list(schedule.orders[rank])
        before, after = order[:slot], order[slot + 1 :]
        yield f"without {action}", with_order(schedule, rank, [*before, *after])
        yield f"{action} twice", with_order(schedule, rank, [*order, action])
        if action.micro_batch is not None:
            beyond = replace(action, micro_batch=schedule.num_micro_batches)
            yield f"{beyond} too many", with_order(schedule, rank, [*order, beyond])
            yield f"{beyond} for {action}", with_order(schedule, rank, [*before, beyond, *after])
            moved = with_order(schedule, rank, [*before, *after])
            other = (rank + 1) % schedule.num_ranks
            yield f"{action} on rank {other}", with_order(moved, other, [*schedule.orders[other], action])
        for later_slot, later in enumerate(order[slot + 1 :], slot + 1):
            if later is not None and depends(later, action):
                swapped = list(order)
                swapped[slot], swapped[later_slot] = later, action
                yield f"{action} and {later} swapped", with_order(schedule, rank, swapped)


def depends(later: Action, earlier: Action) -> bool:
    """Whether some part of `later` needs some part of `earlier`, both of one stage and micro-batch."""
    needs = {("F", "B"), ("F", "I"), ("I", "W")}
    return any(
        (first.kind, second.kind) in needs
        and (first.stage, first.micro_batch) == (second.stage, second.micro_batch)
        for first in earlier.simple_actions
        for second in later.simple_actions
    )


def passes(schedule: Schedule) -> bool:
    try:
        check(schedule)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", SCHEDULES)
def test_check_fails_for_every_mutant(name: ScheduleName) -> None:
    schedule = build_schedule(name, 2, 4)
    check(schedule)
    tried = 0
    for description, mutant in mutants(schedule):
        assert not passes(mutant), f"check passes {description}"
        tried += 1
    assert tried >= 40


def test_check_names_a_deadlock() -> None:
    schedule = build_schedule("1F1B", 2, 4)
    forward_0, forward_1, backward_0, *rest = schedule.orders[0]
    waits = with_order(schedule, 0, [forward_0, backward_0, forward_1, *rest])
    check(waits)  # rank 1 runs 1F0 1B0 and feeds it: no deadlock, only a wait
    forward, backward, other_forward, *rest = schedule.orders[1]
    with pytest.raises(
        ValueError, match="deadlock: rank 0 stops at 0B0: the gradient of stage 1, micro-batch 0, never"
    ):
        check(with_order(waits, 1, [forward, other_forward, backward, *rest]))


def test_check_reads_the_frame() -> None:
    schedule = build_schedule("DualPipeV", 2, 4)
    with pytest.raises(ValueError, match="hold the stages"):
        check(replace(schedule, stages_of_rank=((0, 3), (1, 3))))
    with pytest.raises(ValueError, match="1 orders for 2 ranks"):
        check(replace(schedule, orders=schedule.orders[:1]))
    with pytest.raises(ValueError, match="does not hold"):
        check(replace(schedule, stages_of_rank=((1, 2), (0, 3))))
    rank, slot, pair = next(place for place in actions_by_place(schedule) if place[2].parts)
    order = list(schedule.orders[rank])
    for broken, message in (
        (replace(pair, parts=pair.parts[::-1]), "in that order"),
        (replace(pair, parts=()), "in that order"),
        (replace(pair.parts[0], parts=pair.parts), "has parts"),
    ):
        order[slot] = broken
        with pytest.raises(ValueError, match=message):
            check(with_order(schedule, rank, order))
    nameless = replace(build_schedule("GPipe", 1, 1), orders=((Action(0, ActionKind.FORWARD, None),),))
    with pytest.raises(ValueError, match="needs a micro-batch"):
        run_in_order(nameless, lambda action: 1.0)


# --- peaks ---


@given(small_ranks, small_counts)
def test_in_flight_of_gpipe_and_1f1b(num_ranks: int, num_micro_batches: int) -> None:
    assert (
        peak_in_flight(build_schedule("GPipe", num_ranks, num_micro_batches))
        == ((num_micro_batches,),) * num_ranks
    )
    if num_micro_batches >= num_ranks:
        in_flight = peak_in_flight(build_schedule("1F1B", num_ranks, num_micro_batches))
        assert in_flight == tuple((num_ranks - rank,) for rank in range(num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_in_flight_of_chunked_schedules(num_ranks: int) -> None:
    """Chunks in flight on a rank: what each paper says of its schedule, at two chunks a rank."""
    P, m = num_ranks, 4 * num_ranks
    interleaved = peak_in_flight(build_schedule("Interleaved1F1B", P, m))
    assert [sum(chunks) for chunks in interleaved] == [P + 2 * (P - 1 - rank) + 1 for rank in range(P)]
    # ZB-V keeps what 1F1B keeps, P micro-batches of a whole rank, and keeps it on every rank alike.
    assert [sum(chunks) for chunks in peak_in_flight(build_schedule("ZBVZeroBubble", P, m))] == [2 * P] * P
    # DualPipe over 2P stages of half a rank: 2P+1.
    assert [sum(chunks) for chunks in peak_in_flight(build_schedule("DualPipeV", P, m))] == [2 * P + 1] * P


def test_peak_tells_what_is_alive() -> None:
    schedule = build_schedule("1F1B", 16, 40)
    peak = live_at_peak(schedule, 5, [7] * 16, [0] * 16)
    assert (peak.num_in_flight, peak.peak_bytes, peak.stages) == (11, 77, (5,))
    assert str(schedule.orders[5][peak.slot]) == "5F10"
    assert activation_peaks(schedule, range(16), [0] * 16) == tuple(rank * (16 - rank) for rank in range(16))


def test_deferred_weight_gradients_are_counted() -> None:
    # On the last of four ranks ZB1P defers three weight gradients: W0 follows F3 and I3.
    schedule = build_schedule("InterleavedZeroBubble", 4, 8, 1)
    peak = live_at_peak(schedule, 3, [10] * 4, [6] * 4)
    assert (peak.forward_held, peak.weight_held, peak.peak_bytes) == ((1,), (3,), 28)
    assert str(schedule.orders[3][peak.slot]) == "3F3"
    heavy = live_at_peak(schedule, 3, [10] * 4, [20] * 4)
    assert (heavy.forward_held, heavy.weight_held, heavy.peak_bytes) == ((0,), (4,), 80)


def test_an_overlapped_forward_is_added_before_its_backward_is_removed() -> None:
    schedule = build_schedule("DualPipeV", 4, 8)
    apart = [
        tuple(part for action in schedule.actions(rank) for part in action.simple_actions[::-1])
        for rank in range(4)
    ]
    backward_first = replace(schedule, orders=tuple(apart))
    sizes, nothing = [1] * 8, [0] * 8
    assert activation_peaks(schedule, sizes, nothing) == (9, 9, 9, 9)
    assert activation_peaks(backward_first, sizes, nothing) == (8, 8, 8, 9)  # the turn never overlaps


@settings(deadline=None)
@given(names, small_ranks, small_counts, st.data())
def test_peaks_equal_a_plain_recount(
    name: ScheduleName, num_ranks: int, num_micro_batches: int, data: st.DataObject
) -> None:
    try:
        schedule = build_schedule(name, num_ranks, num_micro_batches)
    except InputError:
        return
    sizes = st.lists(st.integers(0, 9), min_size=schedule.num_stages, max_size=schedule.num_stages)
    forward_bytes, weight_bytes = data.draw(sizes), data.draw(sizes)
    expected = []
    for rank in range(num_ranks):
        held: dict[tuple[int, int | None], int] = {}
        totals = [0]
        for part in (part for action in schedule.actions(rank) for part in action.simple_actions):
            kept = {"F": forward_bytes[part.stage], "I": weight_bytes[part.stage]}
            held[part.stage, part.micro_batch] = kept.get(part.kind, 0)
            totals.append(sum(held.values()))
        assert totals[-1] == 0
        expected.append(max(totals))
    assert activation_peaks(schedule, forward_bytes, weight_bytes) == tuple(expected)


def test_peaks_need_every_stage() -> None:
    with pytest.raises(ValueError, match="4 stages"):
        activation_peaks(build_schedule("Interleaved1F1B", 2, 4), [1, 1], [1, 1, 1, 1])


# --- bubbles ---


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 1), (2, 2), (4, 4), (4, 9), (8, 32)])
@pytest.mark.parametrize("name", SINGLE)
def test_bubble_of_gpipe_and_1f1b(name: ScheduleName, num_ranks: int, num_micro_batches: int) -> None:
    schedule = build_schedule(name, num_ranks, num_micro_batches)
    textbook = (num_ranks - 1) / (num_micro_batches + num_ranks - 1)
    assert bubble_slots(schedule) == pytest.approx([textbook] * num_ranks)
    assert bubble_slots(schedule, 1.5, 2, 0.25) == pytest.approx([textbook] * num_ranks)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_ranks", "rounds"), [(2, 1), (4, 2), (8, 4)])
def test_bubble_of_interleaving_shrinks_with_the_chunks(num_ranks: int, rounds: int, chunks: int) -> None:
    num_micro_batches = rounds * num_ranks
    textbook = (num_ranks - 1) / (chunks * num_micro_batches + num_ranks - 1)
    interleaved = build_schedule("Interleaved1F1B", num_ranks, num_micro_batches, chunks)
    assert bubble_slots(interleaved) == pytest.approx([textbook] * num_ranks)


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 2, 1), (3, 4, 2)])
@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 4), (4, 8), (8, 32)])
def test_bubble_of_zb1p(num_ranks: int, num_micro_batches: int, costs: tuple[int, int, int]) -> None:
    """ZB-H1 idles (P-1)(F+I-W), a third of 1F1B's (P-1)(F+I+W) at equal costs (arXiv:2401.10241, table 2)."""
    forward, input_gradient, weight_gradient = costs
    schedule = build_schedule("InterleavedZeroBubble", num_ranks, num_micro_batches, 1)
    idle = (num_ranks - 1) * (forward + input_gradient - weight_gradient)
    textbook = idle / (idle + num_micro_batches * sum(costs))
    assert bubble_slots(schedule, *costs) == pytest.approx([textbook] * num_ranks)


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 1), (2, 3), (4, 7), (4, 20), (8, 32)])
def test_zbv_never_idles_between_first_and_last_action(num_ranks: int, num_micro_batches: int) -> None:
    """Zero bubble at F = I = W (arXiv:2401.10241 §6): rank r starts r slots late, then never waits."""
    schedule = build_schedule("ZBVZeroBubble", num_ranks, num_micro_batches)
    for rank, spans in enumerate(run_in_order(schedule, lambda action: 1.0)):
        assert spans[0][0] == rank
        assert all(end == start for (_, end), (start, _) in pairwise(spans))
        assert len(spans) == 6 * num_micro_batches
    assert max(bubble_slots(schedule, 1, 1.5, 0.5)) >= max(bubble_slots(schedule))


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 4), (4, 8), (4, 20), (8, 32)])
def test_bubble_of_dual_pipe_v(num_ranks: int, num_micro_batches: int) -> None:
    """DualPipe over 2P stages idles (2P/2-1)(F&B+B-3W) (arXiv:2412.19437, table 2).

    Without communication to hide, F&B is F+B; B is I+W.
    """
    forward, input_gradient, weight_gradient = 1, 1, 1
    backward = input_gradient + weight_gradient
    idle = (num_ranks - 1) * (forward + backward + backward - 3 * weight_gradient)
    textbook = idle / (idle + 2 * num_micro_batches * (forward + backward))
    schedule = build_schedule("DualPipeV", num_ranks, num_micro_batches)
    assert bubble_slots(schedule) == pytest.approx([textbook] * num_ranks)


def test_schedules_rank_as_the_papers_rank_them() -> None:
    bubble = {name: max(bubble_slots(build_schedule(name, 8, 32))) for name in SCHEDULES}
    assert bubble["GPipe"] == bubble["1F1B"] > bubble["Interleaved1F1B"] > bubble["DualPipeV"]
    assert bubble["DualPipeV"] > bubble["ZBVZeroBubble"] == pytest.approx(bubble["InterleavedZeroBubble"])


def test_one_rank_never_idles() -> None:
    for name in SCHEDULES:
        assert bubble_slots(build_schedule(name, 1, 6)) == (0.0,)
    assert bubble_slots(build_schedule("1F1B", 2, 2), 0, 0, 0) == (0.0, 0.0)


def test_run_in_order_takes_any_durations() -> None:
    schedule = build_schedule("1F1B", 2, 2)
    durations = {"0F0": 1, "0F1": 2, "1F0": 3, "1B0": 5, "1F1": 1, "1B1": 4, "0B0": 2, "0B1": 2}
    first, second = run_in_order(schedule, lambda action: durations[str(action)])
    assert first == ((0, 1), (1, 3), (9, 11), (14, 16))
    assert second == ((1, 4), (4, 9), (9, 10), (10, 14))
