"""Rows as runs: groups, recipes, what is scored and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.validate.run_rows import CARRIED, EXPERTS, carried, row_of

from meshwright.validate.described import Refusal, Run, describe, described, group_of, read_runs, recipe_of
from meshwright.validate.rows import Row


def test_every_row_is_a_run_or_a_refusal_with_a_reason() -> None:
    found = read_runs(CARRIED)
    assert len(found.runs) + len(found.refusals) == len(carried())
    reasons = {refusal.id: refusal.reason for refusal in found.refusals}
    assert reasons == {
        "MB-012": "architecture: dimensions not stated",
        "MB-137": "repeat: an older measurement of a recipe that is measured again",
        "MB-069": "task: adapters are trained, not the model",
        "MBC-039": "architecture: images beside text",
        "MPF-074": "quality: graded C by its source's reader",
        "DS-001": "engine: pipeline schedule not described",
    }


@pytest.mark.parametrize(
    ("given_", "group"),
    [
        ({}, "dense"),
        ({"interconnect": "NVLink + EFA 16x400Gb/s per node"}, "dense"),
        ({**EXPERTS}, "moe_full"),
        ({**EXPERTS, "interconnect": "NVLink + EFA 16x400Gb/s per node"}, "moe_efa"),
        ({**EXPERTS, "micro_batch_size": None}, "moe_partial"),
        ({**EXPERTS, "recompute": ""}, "moe_partial"),
        ({**EXPERTS, "pp": 2, "vpp": None}, "moe_partial"),
        ({**EXPERTS, "pp": 2, "vpp": 1}, "moe_full"),
        ({**EXPERTS, "pp": 1, "vpp": None}, "moe_full"),
    ],
)
def test_groups(given_: dict[str, Any], group: str) -> None:
    assert group_of(row_of(**given_)) == group


def test_a_recipe_is_never_split() -> None:
    """Releases, precisions, sizes and cut models of one model and GPU share it; other GPUs do not."""
    base = row_of(source="Megatron-Bridge performance tables", model="DeepSeek-V3", gpu="GB200")
    same = [
        replace(base, precision="bf16"),
        replace(base, num_gpus=512),
        replace(base, source="Megatron-Core MoE paper (arXiv 2603.07685)"),
        replace(base, source="Megatron-MoE-ModelZoo"),
        replace(base, model="deepseek-v3 (4 layers)"),
    ]
    assert {recipe_of(row) for row in same} == {recipe_of(base)}
    other = [replace(base, gpu="GB300"), replace(base, model="Kimi-K2"), replace(base, source="SimuMax B200")]
    assert recipe_of(base) not in {recipe_of(row) for row in other}


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        ({"task": "LoRA"}, "task: "),
        ({"latest_in_group": "n"}, "repeat: "),
        ({"quality": "C"}, "quality: "),
        ({"iteration_time_s": None}, "measurement: nothing measured"),
        ({"sequence_length": None}, "workload: "),
        ({"gpu": "Gaudi 3"}, "cluster: "),
        ({"framework": "Colossal-AI"}, "engine: "),
        ({"precision": "int4"}, "precision: "),
    ],
)
def test_what_is_not_scored(given_: dict[str, Any], reason: str) -> None:
    refused = describe(row_of(**given_))
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith(reason)


def test_fine_tuning_is_priced_as_pre_training() -> None:
    assert isinstance(describe(row_of(task="SFT")), Run)


def test_memory_that_partly_lies_on_the_host_is_not_scored() -> None:
    measured = {"memory": 40.0, "memory_definition": "GiB torch max allocated"}
    kept = describe(row_of(**measured))
    moved = describe(row_of(**measured, dispatcher_overlap="activation offload ON"))
    assert isinstance(kept, Run)
    assert isinstance(moved, Run)
    assert kept.memory is not None
    assert moved.memory is None


def _cells() -> st.SearchStrategy[tuple[str, Any]]:
    wild = {
        "str": st.text(max_size=40),
        "int | None": st.one_of(st.none(), st.integers(0, 300), st.sampled_from([10**6, 2**40])),
        "float | None": st.one_of(st.none(), st.floats(0, 1e12)),
        "bool | None": st.one_of(st.none(), st.booleans()),
    }
    return st.one_of(
        *(
            st.tuples(st.just(field.name), wild[str(field.type)])
            for field in fields(Row)
            if field.name != "id"
        )
    )


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(carried())), cells=st.lists(_cells(), min_size=1, max_size=3))
def test_whatever_a_row_holds_it_is_a_run_or_refused(name: str, cells: list[tuple[str, Any]]) -> None:
    row = replace(carried()[name], **dict(cells))
    found = described([row])
    assert len(found.runs) + len(found.refusals) == 1
    assert all(run.candidates for run in found.runs)
    assert all(refusal.reason for refusal in found.refusals)
