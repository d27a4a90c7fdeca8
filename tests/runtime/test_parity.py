"""Any layout trains as one process does: losses, gradients, norms and weights, step by step.

`layouts.py` lists the layouts and the largest errors; `parity_runs.py` says how errors are taken.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from layouts import CASES, CLIPS, DRAWN, GIVEN, HALF, MODELS, STEPS, Case, drawn, limits, pairs
from parity_runs import compared, reference
from training_runs import has_several_documents, stream_of

from meshwright.model import Model
from meshwright.policy import SCHEDULES

OPTIMIZERS = ("sgd", "adamw")


# what is compared


def test_every_pair_of_features_is_among_the_chosen_layouts() -> None:
    missing = [sorted(pair) for pair in pairs() if not any(pair <= case.features for case in GIVEN)]
    assert not missing


def test_there_are_enough_layouts_of_every_size_and_each_is_there_once() -> None:
    assert len(GIVEN) >= 24
    assert {case.world for case in CASES} == {2, 4, 8, 16}
    assert len({str(case) for case in (*CASES, *HALF)}) == len(CASES) + len(HALF)


def test_every_choice_of_policy_is_among_them() -> None:
    policies = [case.plan("sgd") for case in GIVEN]
    assert {plan.policy.schedule for plan in policies if plan.layout.pp > 1} == set(SCHEDULES)
    assert {plan.policy.zero_stage for plan in policies} == {0, 1, 2, 3}
    assert {plan.policy.recompute for plan in policies} == {"none", "selective", "full"}
    assert {plan.policy.dispatcher for plan in policies} == {"alltoall", "allgather"}
    for dispatcher, split in product(("alltoall", "allgather"), (True, False)):
        assert any(p.policy.dispatcher == dispatcher and (p.layout.etp > 1) is split for p in policies)


def test_every_kind_of_model_is_among_them() -> None:
    assert {case.model for case in GIVEN} == set(MODELS)
    plans = [case.plan("sgd") for case in GIVEN]
    assert any(p.layout.tp > p.model.kv_heads and p.model.qk_norm == "full" for p in plans)
    tied = [p for p in plans if p.model.tie_word_embeddings and p.layout.pp > 1]
    assert {p.policy.schedule for p in tied} >= {"1F1B", "ZBVZeroBubble"}  # ends on two ranks, and on one
    assert {p.policy.zero_stage for p in tied} >= {1, 3}
    for name in ("gated", "norm", "position", "expert_bias", "shared_expert_gate"):
        assert len({getattr(p.model, name) for p in plans if p.model.is_moe}) == 2, name
    assert all(plan.model.router.capacity_factor is None for plan in plans)


def test_drawing_is_repeatable() -> None:
    assert [str(case) for case in drawn(len(DRAWN))] == [str(case) for case in DRAWN]


def test_sequences_hold_several_documents(corpus: Path) -> None:
    stream = stream_of(GIVEN[0].plan("sgd"), corpus)
    shares = [has_several_documents(stream.next().documents) for _ in range(STEPS)]
    assert sum(shares) / STEPS > 0.5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_one_process_learns_and_no_decision_is_near_a_tie(model: str, optimizer: str, corpus: Path) -> None:
    """Scores that are tied to within rounding may be decided either way: then layouts differ, and no one is
    wrong. Rounding moves scores by some 1e-6 of their spread here."""
    known = reference(model, "fp32", optimizer, corpus)
    assert known.steps[-1].loss < known.steps[0].loss - 0.1
    assert known.margin > 5e-6


def test_gradients_are_clipped_in_some_runs_and_not_in_others(corpus: Path) -> None:
    norms = {model: reference(model, "fp32", "sgd", corpus).steps[0].norm for model in MODELS}
    assert {model for model in MODELS if CLIPS[model] and norms[model] > CLIPS[model]} >= {"gated", "tied"}
    assert not all(CLIPS.values())


def test_uneven_routing_leaves_ranks_without_a_token(corpus: Path) -> None:
    model = Model(**MODELS["uneven"])
    for step in reference("uneven", "fp32", "sgd", corpus).steps:
        for counts in step.chosen.values():
            shares = counts.double() / counts.sum()
            assert shares.max() > 2.5 / model.num_experts
            assert (shares.view(4, -1).sum(1) == 0).any()  # of four ranks, two experts each


# the comparison itself


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_trains_as_one_process(case: Case, optimizer: str, corpus: Path) -> None:
    assert compared(case, optimizer, corpus).beyond(limits(case, optimizer)) == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", HALF, ids=str)
def test_half_precision_differs_by_rounding(case: Case, optimizer: str, corpus: Path) -> None:
    assert compared(case, optimizer, corpus).beyond(limits(case, optimizer)) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_fp32(precision: str, corpus: Path) -> None:
    """Of one process, with FP32 masters: the loss of every step to within a unit roundoff."""
    known = reference("gated", precision, "sgd", corpus)
    exact = reference("gated", "fp32", "sgd", corpus, by_place=True)
    unit = 2.0**-8 if precision == "bf16" else 2.0**-11
    for step, right in zip(known.steps, exact.steps, strict=True):
        assert step.loss == pytest.approx(right.loss, rel=unit)
        assert step.norm == pytest.approx(right.norm, rel=2 * unit)
    assert all(weights.dtype == torch.float32 for weights in known.weights.values())
    assert math.isfinite(known.steps[-1].loss)
