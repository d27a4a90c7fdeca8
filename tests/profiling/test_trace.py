"""What is read from a trace: steps, collectives with their bytes, compute, and modules in both directions."""

from __future__ import annotations

import pytest
from traces import call, event, note

from meshwright.profiling.trace import labelled_calls, rank_trace
from meshwright.profiling.usage import rank_use


def test_a_call_that_blocks_is_exposed_although_an_op_of_autograd_spans_it() -> None:
    events = [
        note("step:0", 0, 100),
        event("autograd::engine::evaluate_function: _ExchangeBackward", 10, 60),
        event("aten::mm", 10, 30),
        call("ep", "all_to_all", 64, 30, 60),
        event("c10d::alltoall_base_", 31, 40),
        event("aten::add", 60, 80),
    ]
    found = rank_use(rank_trace(0, events))
    (axis,) = found.axes
    assert (axis.axis, axis.calls, axis.bytes) == ("ep", 1, 64)
    assert axis.exposed_s == pytest.approx(30e-6)
    assert axis.hidden_s == pytest.approx(0)
    assert found.compute_s == pytest.approx(40e-6)
    assert found.idle_s == pytest.approx(30e-6)


def test_time_between_steps_counts_nowhere() -> None:
    events = [note("step:0", 0, 10), note("step:1", 30, 40), event("aten::mm", 5, 35)]
    found = rank_use(rank_trace(0, events))
    assert found.step_s == pytest.approx(10e-6)
    assert found.compute_s == pytest.approx(5e-6)


def test_receives_take_the_axis_of_sends_and_are_not_counted_again() -> None:
    events = [
        note("step:0", 0, 100),
        call("pp", "send_recv", 256, 10, 11),
        event("gloo:send", 10, 20, "user_annotation"),
        event("gloo:recv", 30, 70, "user_annotation"),
    ]
    trace = rank_trace(0, events)
    assert list(labelled_calls(trace)) == [("pp", "send_recv", 256)]
    (axis,) = rank_use(trace).axes
    assert axis.seconds == pytest.approx(50e-6)
    assert (axis.calls, axis.bytes) == (1, 256)


def test_modules_have_their_own_time_and_backward_goes_to_who_made_the_node() -> None:
    engine = "autograd::engine::evaluate_function: "
    events = [
        note("step:0", 0, 200),
        note("module:", 0, 50),
        note("module:layers.0.attention", 10, 40),
        note("module:layers.0.attention.q", 12, 20),
        event("aten::linear", 13, 19, **{"Sequence number": 5, "Fwd thread id": 0}),
        call("tp", "all_gather", 8, 25, 35),
        event("aten::mul", 41, 44, **{"Sequence number": 6, "Fwd thread id": 0}),
        event(f"{engine}MulBackward0", 60, 64, **{"Sequence number": 6}),
        event(f"{engine}AddmmBackward0", 70, 90, **{"Sequence number": 5}),
        event(f"{engine}torch::autograd::AccumulateGrad", 90, 95, **{"Sequence number": -1}),
    ]
    trace = rank_trace(0, events)
    assert trace.forward["layers.0.attention.q"] == pytest.approx(8e-6)
    assert trace.forward["layers.0.attention"] == pytest.approx((30 - 8 - 10) * 1e-6)
    assert trace.forward[""] == pytest.approx((50 - 30) * 1e-6)
    assert trace.backward[""] == pytest.approx(4e-6)
    assert trace.backward["layers.0.attention.q"] == pytest.approx(25e-6)


def test_on_a_gpu_kernels_count_and_not_what_launches_them() -> None:
    events = [
        note("step:0", 0, 100),
        event("aten::mm", 0, 5),
        event("gemm", 10, 50, "kernel"),
        event("ncclDevKernel_AllReduce", 30, 80, "kernel"),
        call("tp", "all_reduce", 32, 6, 8),
        event("collective:tp all_reduce 32", 30, 80, "gpu_user_annotation"),
    ]
    found = rank_use(rank_trace(0, events))
    assert found.compute_s == pytest.approx(40e-6)
    assert found.axes[0].seconds == pytest.approx(50e-6)
    assert found.axes[0].hidden_fraction == pytest.approx(0.4)


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 3 has no step"):
        rank_trace(3, [event("aten::mm", 0, 1)])
