"""One rank's whole step at full size: its trainer is built and steps once, on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from meshwright.ir.observed import Conduct, HeldParameter, Observed, RankFacts, StageFacts
from meshwright.plan import Plan
from meshwright.runtime.attention import Attention
from meshwright.runtime.buckets import Bucket
from meshwright.runtime.calls import element_name
from meshwright.runtime.dryrun.actions import actions_seen
from meshwright.runtime.dryrun.known import KnownNumbers
from meshwright.runtime.dryrun.recorder import Recorder
from meshwright.runtime.dryrun.remembered import RememberedResults
from meshwright.runtime.dryrun.routes import routes_of
from meshwright.runtime.dryrun.seams import routing
from meshwright.runtime.dryrun.world import rank_of
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.pipeline import Pipeline
from meshwright.runtime.sharded import Sharded
from meshwright.runtime.shares import Held
from meshwright.runtime.step import Trainer


@contextmanager
def rehearsal(plan: Plan) -> Iterator[Recorder]:
    """While active, tensors have no values, and the recorder sees what is done with them."""
    results = _results()
    known = KnownNumbers(routes_of(plan), results.run, results.whole_numbers)
    recorder = Recorder(known)
    with (
        routing(known),
        results.mode,
        recorder.storages.watching_resizes(),
        actions_seen(recorder),
        recorder,
    ):
        yield recorder


@cache
def _results() -> RememberedResults:
    """One for all rehearsals of this process: ranks run the same ops."""
    return RememberedResults(FakeTensorMode())


def trainer_of(plan: Plan, mesh: Mesh, recorder: Recorder) -> Trainer:
    """A rank's trainer, whose tensors are known by class."""
    recorder.name_groups(mesh)
    trainer = Trainer(plan, mesh, _without_values, routes_evenly=True)
    _classify(trainer, recorder)
    _hear_of(trainer, recorder)
    return trainer


def _without_values(held: Held) -> Tensor:
    return torch.empty(held.slice.shape)


def observe(plan: Plan, rank: int) -> Observed:
    """What a rank holds and does in a whole step of a plan. Raises what training would raise."""
    with rank_of(plan, rank) as mesh, rehearsal(plan) as recorder:
        trainer = trainer_of(plan, mesh, recorder)
        build_bytes = recorder.storages.most
        recorder.step_begins()
        rows, length = plan.sequences_per_replica, plan.workload.max_sequence_length
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=mesh.device)
        trainer.step(tokens, torch.zeros_like(tokens))
        conduct, peak = conduct_of(trainer, recorder), recorder.storages.peak()
        return Observed(facts_of(mesh, trainer), conduct, peak, build_bytes)


def conduct_of(trainer: Trainer, recorder: Recorder) -> Conduct:
    """What a rank was seen to hold and do."""
    groups = trainer.mesh.groups
    return Conduct(
        stages_of(trainer),
        parameters_of(trainer),
        tuple(sorted((axis, group.size()) for axis, group in groups.items())),
        tuple(recorder.events),
        recorder.done(),
    )


def facts_of(mesh: Mesh, trainer: Trainer | None = None) -> RankFacts:
    """What is a rank's own. Without a trainer it holds nothing."""
    groups = {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in mesh.groups.items()}
    expert = mesh.layout.coordinates(mesh.rank, "expert")
    dense = mesh.layout.coordinates(mesh.rank)
    coordinates = {**dense, **{axis: expert[axis] for axis in ("etp", "ep", "edp")}}
    held = [] if trainer is None else trainer.replica.held
    return RankFacts(mesh.rank, coordinates, groups, {one.name: one.slice.ranges for one in held})


def parameters_of(trainer: Trainer) -> tuple[HeldParameter, ...]:
    """Every parameter of a rank, from the tensors that exist."""
    found = []
    for held in trainer.replica.held:
        tensor = held.tensor
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        size = local.numel() * local.element_size()
        shape = tuple(tensor.shape)
        found.append(HeldParameter(held.name, shape, element_name(local.dtype), local.numel(), size))
    return tuple(found)


def stages_of(trainer: Trainer) -> tuple[StageFacts, ...]:
    """A rank's stages as they were built."""
    pipeline, plan = trainer.replica.pipeline, trainer.plan
    found = []
    for index, stage in trainer.replica.stages.items():
        layers = tuple(int(name) for name in stage.layers)
        takes, gives = _ends(pipeline, index, plan)
        found.append(StageFacts(index, layers, stage.has_embedding, stage.has_head, takes, gives))
    return tuple(found)


def _ends(pipeline: Pipeline, index: int, plan: Plan) -> tuple[tuple[str, tuple[int, ...]], ...]:
    stream = pipeline._stream(plan.workload.max_sequence_length)
    between = element_name(stream.dtype), tuple(stream.shape)
    last = plan.layout.num_stages - 1
    return ("", ()) if index == 0 else between, ("", ()) if index == last else between


def _classify(trainer: Trainer, recorder: Recorder) -> None:
    storages = recorder.storages
    for part in trainer.replica.store.parts:
        if isinstance(part, Bucket | Sharded):
            storages.rename(part.gradients, "gradients")
        if isinstance(part, Bucket):
            storages.rename(part.own_gradients, "gradients")
            if part.masters.untyped_storage()._cdata != part.weights.untyped_storage()._cdata:
                storages.rename(part.masters, "optimizer")
    for moments in trainer.optimizer.moments.values():
        for moment in moments.values():
            storages.rename(moment, "optimizer")


def _hear_of(trainer: Trainer, recorder: Recorder) -> None:
    """Have the recorder know when the update begins, and which window attention looks through; and, of a
    stage without a pipeline, whose actions are not seen, when a micro-batch goes forward and backward."""
    step = trainer.optimizer.step

    def updating() -> object:
        recorder.phase, recorder.storages.now = "update", "update"
        return step()

    trainer.optimizer.step = updating  # type: ignore[method-assign,assignment]

    def look(module: Attention, _: object) -> None:
        recorder.window = module.window

    for stage in trainer.replica.stages.values():
        for module in stage.modules():
            if isinstance(module, Attention):
                module.register_forward_pre_hook(look)
    if trainer.plan.layout.num_stages == 1:
        (stage,) = trainer.replica.stages.values()
        _name_micro_batches(stage, recorder)


def _name_micro_batches(stage: nn.Module, recorder: Recorder) -> None:
    place = count()

    def forward(module: nn.Module, _: object) -> None:
        recorder.storages.now = f"forward of micro-batch {next(place)} on stage 0"

    def backward(module: nn.Module, _: object, out: object) -> None:
        """A forward is followed by its backward."""
        recorder.storages.now = recorder.storages.now.replace("forward", "backward")

    stage.register_forward_pre_hook(forward, prepend=True)
    stage.register_forward_hook(backward)
