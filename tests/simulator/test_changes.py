"""Single changes that shorten a step: legal, fitting, and as fast as said."""

from __future__ import annotations

import pytest
from tests.simulator.plans import example, plan

from meshwright.cost.memory import memory, worst
from meshwright.ir.program import lower
from meshwright.simulator.changes import LEAST, candidates, changes
from meshwright.simulator.simulate import simulate
from meshwright.verify import verify


@pytest.mark.parametrize("name", ["brief-repaired", "qwen3-30b-a3b-512", "qwen3-30b-a3b-16"])
def test_each_change_is_a_plan_that_runs_and_is_as_fast(name: str) -> None:
    asked = example(name)
    plans = {words: other for words, other in candidates(asked) if other is not None}
    found = changes(asked, asked.workload.max_sequence_length)
    assert found
    now_s = simulate(asked).step_time_s
    for change in found:
        other = plans[change.words]
        assert [finding for finding in verify(other) if finding.level == "error"] == []
        assert change.step_time_s == pytest.approx(simulate(other).step_time_s, rel=1e-9)
        assert change.saved_s == pytest.approx(now_s - change.step_time_s, rel=1e-6)
        assert change.saved_s >= LEAST * now_s
        assert change.peak_memory_bytes == worst(memory(lower(other))).total_bytes
        assert change.peak_memory_bytes <= asked.cluster.gpu.memory
    assert [c.saved_s for c in found] == sorted((c.saved_s for c in found), reverse=True)


def test_a_change_turns_one_thing() -> None:
    """A degree with dp in exchange, or one choice; ranks and sequences stay."""
    asked = example("brief-repaired")
    words = [one for one, _ in candidates(asked)]
    assert len(words) == len(set(words))
    assert {"EP 8 instead of 16", "EP 32 instead of 16", "PP 2 instead of 4 (DP 32)"} < set(words)
    for _, other in candidates(asked):
        if other is None:
            continue
        assert other.layout.world_size == asked.layout.world_size
        assert other.workload == asked.workload
        before, after = asked.layout.degrees(), other.layout.degrees()
        turned = {axis for axis in ("tp", "cp", "pp", "vpp", "ep", "etp") if before[axis] != after[axis]}
        assert len(turned) <= 1
        assert sum(other.policy.layers_per_stage) == asked.model.num_hidden_layers


def test_what_cannot_be_is_left_out() -> None:
    """Expert groups as large as they go, and dp of one: no larger ep, no more of tp."""
    asked = plan({"tp": 8, "pp": 2, "dp": 1, "ep": 8}, {"micro_batch_size": 1}, nodes=2)
    wide = [words for words, other in candidates(asked) if other is None]
    assert any(words.startswith("EP 16") for words in wide)
    assert not any(words.startswith("TP 16") for words, _ in candidates(asked))
