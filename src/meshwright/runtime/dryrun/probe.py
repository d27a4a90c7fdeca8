"""What every rank declares and does, found cheaply: built whole, it runs one micro-batch through few layers.

Of each stage those layers run that are built unlike the ones before them; all else is the rank's own trainer:
its groups, its parameters, its reductions and its update. Ranks whose conduct is equal are one class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.ir.observed import Conduct, Observed, StageFacts
from meshwright.plan import Plan
from meshwright.runtime.calls import element_name
from meshwright.runtime.dryrun.recorder import Recorder
from meshwright.runtime.dryrun.rehearse import conduct_of, facts_of, rehearsal, trainer_of
from meshwright.runtime.dryrun.world import rank_of
from meshwright.runtime.model import Stage
from meshwright.runtime.step import Trainer

_PLAIN = (int, float, str, bool, type(None))
_OWN = {"layer", "training"}
"""Plain attributes by which modules of one kind differ."""


def probe(plan: Plan, rank: int) -> Observed:
    """A rank's facts and its conduct in a step of one micro-batch. What fails is told in its conduct."""
    with rank_of(plan, rank) as mesh:
        try:
            with rehearsal(plan) as recorder:
                recorder.counts_bytes = False
                trainer = trainer_of(plan, mesh, recorder)
                return Observed(facts_of(mesh, trainer), _probed(trainer, recorder))
        except Exception as error:
            return Observed(facts_of(mesh), Conduct(failed=told(error)))


def told(error: Exception) -> str:
    """An error's first cause, in a line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _probed(trainer: Trainer, recorder: Recorder) -> Conduct:
    gives: dict[int, Tensor] = {}
    recorder.step_begins()

    def run(tokens: Tensor, targets: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        return sum(_through(trainer, tokens, targets, gives), torch.zeros(()))

    trainer.replica.pipeline.run = run  # type: ignore[method-assign]
    plan, device = trainer.plan, trainer.mesh.device
    size = plan.policy.micro_batch_size, plan.workload.max_sequence_length
    tokens = torch.zeros(size, dtype=torch.int64, device=device)
    trainer.step(tokens, torch.zeros_like(tokens))
    conduct = conduct_of(trainer, recorder)
    last = plan.layout.num_stages - 1
    stages = tuple(replace(s, gives=_described(gives[s.index], s, last)) for s in conduct.stages)
    return replace(conduct, stages=stages)


def _described(out: Tensor, stage: StageFacts, last: int) -> tuple[str, tuple[int, ...]]:
    return ("", ()) if stage.index == last else (element_name(out.dtype), tuple(out.shape))


def _through(trainer: Trainer, tokens: Tensor, targets: Tensor, gives: dict[int, Tensor]) -> Iterator[Tensor]:
    """One micro-batch forward and backward through each stage of a rank by itself; the loss of the last."""
    pipeline = trainer.replica.pipeline
    for index, stage in trainer.replica.stages.items():
        whole = stage.layers
        stage.layers = nn.ModuleDict({name: whole[name] for name in unlike(stage, trainer)})
        stream = pipeline._stream(tokens.shape[1])
        x = tokens if index == 0 else torch.empty_like(stream, device=tokens.device).requires_grad_()
        out = gives[index] = stage(x, targets=targets)
        if out.dim() == 0:
            out.backward()
            yield out.detach()
        else:
            out.backward(torch.empty_like(out))
        stage.layers = whole
    _lend_counts(trainer)


def _lend_counts(trainer: Trainer) -> None:
    """Layers that did not run have counted nothing, and correction biases follow from counts."""
    layers = [moe for _, moe in trainer.moe_layers()]
    run = next((moe.counts for moe in layers if moe.counts is not None), None)
    for moe in layers:
        moe.counts = moe.counts or run


def unlike(stage: Stage, trainer: Trainer) -> list[str]:
    """The layers of a stage that are built unlike those before them: of each kind the first."""
    found: dict[Any, str] = {}
    for name, layer in stage.layers.items():
        found.setdefault(tuple(_built(layer, trainer)), name)
    return list(found.values())


def _built(module: nn.Module, trainer: Trainer) -> Iterator[Any]:
    """How a module and its parts are built: types, plain attributes, shapes, and whether they know of the
    surroundings that the rank has."""
    for name, part in module.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(part).items())
            if isinstance(value, _PLAIN) and key not in _OWN
        )
        shapes = tuple((key, tuple(p.shape), p.dtype) for key, p in part.named_parameters(recurse=False))
        own = getattr(part, "setting", trainer.replica.setting) is trainer.replica.setting
        yield name, type(part), plain, shapes, own
