"""Which actions torch's pipelining runs, in which order: seen at the stages' own methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineSchedule

from meshwright.ir.observed import Did
from meshwright.runtime.dryrun.recorder import Recorder


@contextmanager
def actions_seen(recorder: Recorder) -> Iterator[None]:
    """While active, forwards, backwards and their halves are among the recorder's events as they start. What
    is sent before the first step to warm connections up runs and is not recorded."""
    forward, backward = PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk
    weights, warm_up = PipelineStage.backward_weight_one_chunk, _PipelineSchedule._warmup_p2p

    def forwarded(self: Any, place: int, *args: Any, **options: Any) -> Any:
        _note(recorder, Did("F", self.stage_index, place))
        return forward(self, place, *args, **options)

    def backwarded(
        self: Any, place: int, loss: Any = None, full_backward: bool = True, *args: Any, **options: Any
    ) -> Any:
        _note(recorder, Did("B" if full_backward else "I", self.stage_index, place))
        return backward(self, place, loss, full_backward, *args, **options)

    def weighed(self: Any, place: int, *args: Any, **options: Any) -> Any:
        _note(recorder, Did("W", self.stage_index, place))
        return weights(self, place, *args, **options)

    def warmed(self: Any, *args: Any, **options: Any) -> Any:
        recorder.paused = True
        try:
            return warm_up(self, *args, **options)
        finally:
            recorder.paused = False

    changed: tuple[tuple[Any, str, Callable[..., Any], Callable[..., Any]], ...] = (
        (PipelineStage, "forward_one_chunk", forwarded, forward),
        (PipelineStage, "backward_one_chunk", backwarded, backward),
        (PipelineStage, "backward_weight_one_chunk", weighed, weights),
        (_PipelineSchedule, "_warmup_p2p", warmed, warm_up),
    )
    for owner, name, new, _ in changed:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, _, old in changed:
            setattr(owner, name, old)


def _note(recorder: Recorder, did: Did) -> None:
    recorder.events.append(did)
    words = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
    recorder.storages.now = f"{words[did.kind]} of micro-batch {did.micro_batch} on stage {did.stage}"
