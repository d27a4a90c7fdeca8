"""Ranks against ranks, on made-up conducts: who calls otherwise, whose buffers do not fit, who waits."""

from __future__ import annotations

import pytest

from meshwright.dryrun.matching import mismatches, stuck
from meshwright.ir.graph import CollectiveKind
from meshwright.ir.observed import Call, Conduct, Did, Event

GATHER = Call(CollectiveKind.ALL_GATHER, "tp", "bf16", 64, 32)
SCATTER = Call(CollectiveKind.REDUCE_SCATTER, "tp", "bf16", 64, 32)
SUM = Call(CollectiveKind.ALL_REDUCE, "tp", "fp32", 16, 16)
SEND = Call(CollectiveKind.SEND_RECV, "pp", "bf16", 8, 8, peer=1)
BACK = SEND._replace(peer=0)
RECEIVE = SEND._replace(peer=0, is_receive=True)
ANSWER = RECEIVE._replace(peer=1)
F, B = Did("F", 0, 0), Did("B", 0, 0)

PAIR = {"tp": [(0, 1)]}
PIPELINE = {"pp": [(0, 1)]}


def conducts(*ranks: tuple[Event, ...]) -> list[Conduct]:
    return [Conduct(events=events) for events in ranks]


def exchange(sent: tuple[int, ...], received: tuple[int, ...]) -> Call:
    rows = 4 * sum(sent), 4 * sum(received)
    return Call(CollectiveKind.ALL_TO_ALL, "ep", "fp32", *rows, sent, received)


# group by group


def test_ranks_that_call_alike_match() -> None:
    assert list(mismatches(PAIR, conducts((GATHER, SUM), (GATHER, SUM)))) == []
    assert (
        list(mismatches({"ep": [(0, 1)]}, conducts((exchange((1, 3), (1, 2)),), (exchange((2, 0), (3, 0)),))))
        == []
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ((SUM, GATHER), "call 1 along tp: all_reduce of 16 B of fp32, where the others of ranks"),
        ((GATHER,), "call 2 along tp: has ended"),
        ((GATHER, SUM, SUM), "call 3 along tp: all_reduce of 16 B of fp32"),
        ((GATHER._replace(element="fp32"), SUM), "all_gather of 64 B of fp32"),
        ((GATHER, SUM._replace(bytes=8)), "all_reduce of 8 B of fp32"),
    ],
)
def test_a_rank_that_calls_otherwise_is_named(other: tuple[Event, ...], words: str) -> None:
    usual = (GATHER, SUM)
    (found,) = mismatches({"tp": [(0, 1), (2, 3)]}, conducts(usual, usual, usual, other))
    assert found.startswith("rank 3, ")
    assert words in found


def test_buffers_that_do_not_fit_the_group_are_found() -> None:
    for call in (GATHER, SCATTER):
        (found,) = mismatches(PAIR, conducts((call._replace(other_bytes=16),), (call,)))
        assert (
            found
            == f"rank 0, call 1 along tp: {call.kind.value} of 64 B of bf16 over 2 ranks with 16 B for each"
        )


def test_rows_that_are_sent_and_not_expected_are_found() -> None:
    (found,) = mismatches(
        {"ep": [(0, 1)]}, conducts((exchange((1, 3), (1, 2)),), (exchange((2, 0), (2, 0)),))
    )
    assert found == "rank 0, call 1 along ep: sends 3 rows to rank 1, which expects 2"


def test_a_rank_that_failed_is_left_out() -> None:
    assert list(mismatches(PAIR, [Conduct(events=(GATHER,)), Conduct(failed="no")])) == []


# all ranks to the end


def test_ranks_that_meet_get_to_the_end() -> None:
    assert stuck(PAIR, conducts((GATHER, SUM), (GATHER, SUM))) is None
    assert stuck(PIPELINE, conducts((F, SEND, ANSWER, B), (RECEIVE, F, B, BACK))) is None


def test_what_is_posted_at_once_does_not_wait() -> None:
    """Both send before they wait for what comes."""
    assert stuck(PIPELINE, conducts((ANSWER, SEND), (RECEIVE, BACK))) is None


@pytest.mark.parametrize("other", [(SCATTER, GATHER), (GATHER, SCATTER._replace(bytes=128))])
def test_another_call_in_the_same_place_is_found(other: tuple[Event, ...]) -> None:
    found = stuck(PAIR, conducts((GATHER, SCATTER), other))
    assert found is not None
    assert ", where rank " in found.words


def test_a_call_left_out_keeps_the_others_waiting() -> None:
    found = stuck(PAIR, conducts((GATHER, SUM), (GATHER,)))
    assert found is not None
    assert (found.ranks, found.words) == (
        (0,),
        "rank 0 waits for ever in all_reduce of 16 B of fp32 along tp",
    )


def test_two_groups_in_opposite_orders_wait_for_each_other() -> None:
    other = SUM._replace(axis="dp_cp")
    found = stuck({"tp": [(0, 1)], "dp_cp": [(0, 1)]}, conducts((SUM, other), (other, SUM)))
    assert found is not None
    assert found.ranks == (0, 1)


def test_a_send_that_nobody_receives_is_found() -> None:
    found = stuck(PIPELINE, conducts((SEND, F, SEND), (RECEIVE,)))
    assert found is not None
    assert found.ranks == (0,)
    assert "rank 0 sends 8 B of bf16 to rank 1 along pp, which does not receive it" in found.words


def test_a_receive_that_nobody_sends_is_found() -> None:
    found = stuck(PIPELINE, conducts((SEND,), (RECEIVE, RECEIVE)))
    assert found is not None
    assert found.words == "rank 1 waits for ever in a receive of 8 B of bf16 from rank 0 along pp"


@pytest.mark.parametrize("change", [{"bytes": 4}, {"element": "fp16"}])
def test_a_receive_of_something_else_than_was_sent_is_found(change: dict) -> None:
    found = stuck(PIPELINE, conducts((SEND,), (RECEIVE._replace(**change),)))
    assert found is not None
    assert found.ranks == (1,)
    assert "from rank 0, which sends 8 B of bf16" in found.words
