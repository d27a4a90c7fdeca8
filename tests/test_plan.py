"""Plans: every field resolved, every default named, read back equal, and refused when changed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.deployment import Deployment, deployment_from, read_deployment
from meshwright.errors import InputError
from meshwright.files import read_yaml, to_yaml
from meshwright.plan import Plan, open_placement, read_plan, resolve, split_layers, write_plan
from meshwright.verify import require_valid

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
OPEN = {"brief", "brief-plan"}  # the brief's own layout cannot exist; the other leaves it to a search
PLANNED = [path for path in EXAMPLES if path.stem not in OPEN]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_plan_reads_back_equal(path: Path, tmp_path: Path) -> None:
    plan = resolve(read_deployment(path))
    require_valid(plan)
    write_plan(plan, tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml")
    assert again == plan
    assert again.digest == plan.digest


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_a_plan_stands_for_its_deployment(path: Path, tmp_path: Path) -> None:
    """Resolving a plan's file again changes nothing, and leaves no default to choose."""
    plan = resolve(read_deployment(path))
    write_plan(plan, tmp_path / "plan.yaml")
    again = resolve(read_deployment(tmp_path / "plan.yaml"))
    assert again.digest == plan.digest
    assert again.defaults == {}


def test_a_plan_changed_by_hand_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    write_plan(resolve(read_deployment(PLANNED[0])), file)
    document = read_yaml(file)
    document["workload"]["global_batch_size"] *= 2
    file.write_text(to_yaml(document))
    with pytest.raises(InputError, match="digest"):
        read_plan(file)
    with pytest.raises(InputError, match="digest"):
        open_placement(file, Deployment)


def test_the_digest_is_of_what_runs() -> None:
    plan = resolve(read_deployment(PLANNED[0]))
    assert plan.model_copy(update={"name": "other", "defaults": {}}).digest == plan.digest
    layout = plan.layout.model_copy(update={"vpp": 2})
    assert plan.model_copy(update={"layout": layout}).digest != plan.digest


def small(layout: dict[str, int], policy: dict[str, object] | None = None) -> Plan:
    document = {
        "cluster": {"nodes": 2, "gpu": "h100-sxm"},
        "model": {
            "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 8, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 64, "vocab_size": 100,
        },
        "workload": {"global_batch_size": 64, "sequence_length": 128},
        "layout": layout,
        "policy": policy or {},
    }  # fmt: skip
    return resolve(deployment_from(document, Path()))


def test_defaults_are_the_contract() -> None:
    """dp fills the world, etp is 1 with ep and tp without, vpp follows the schedule, SP follows tp."""
    assert small({"tp": 2, "pp": 2}).layout.degrees() == {
        "tp": 2, "cp": 1, "dp": 4, "pp": 2, "vpp": 1, "ep": 1, "etp": 2, "edp": 4, "world_size": 16,
    }  # fmt: skip
    assert small({"tp": 2, "ep": 4}).layout.etp == 1
    assert small({"pp": 2}, {"schedule": "Interleaved1F1B"}).layout.vpp == 2
    assert small({"pp": 2}, {"schedule": "DualPipeV"}).layout.vpp == 2
    assert small({"pp": 2, "vpp": 4}).policy.schedule == "Interleaved1F1B"
    assert small({"tp": 2}).policy.sequence_parallel
    assert not small({"tp": 1}).policy.sequence_parallel


def test_every_default_is_named_and_nothing_given_is() -> None:
    plan = small({"tp": 2, "pp": 2}, {"zero_stage": 2})
    assert {"layout.dp", "layout.cp", "layout.ep", "layout.etp", "policy.engine"} <= plan.defaults.keys()
    assert not {"layout.tp", "layout.pp", "policy.zero_stage"} & plan.defaults.keys()
    given = {"layout.tp", "layout.pp", "layout.dp_replicas"}  # ZeRO's groups have no replicas unless stated
    stated = {f"layout.{name}" for name in type(plan.layout).model_fields} - given
    assert stated <= plan.defaults.keys()
    fields = {f"policy.{name}" for name in type(plan.policy).model_fields} - {"policy.zero_stage"}
    assert fields <= plan.defaults.keys()


@given(layers=st.integers(1, 200), stages=st.integers(1, 64))
def test_layers_are_split_as_even_as_can_be(layers: int, stages: int) -> None:
    if stages > layers:
        with pytest.raises(InputError, match=r"layout\.pp"):
            split_layers(layers, stages)
        return
    split = split_layers(layers, stages)
    assert sum(split) == layers
    assert len(split) == stages
    assert max(split) - min(split) <= 1
    if min(split) < max(split):
        assert split[-1] == min(split), "the stage with the head is never the longer one"


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ({"tp": 3}, "must divide the 16 GPUs"),
        ({"tp": 2, "dp": 4}, "must equal the 16 GPUs"),
        ({"tp": 32}, "must divide the 16 GPUs"),
        ({"ep": 3}, "must divide tp·cp·dp = 16"),
        ({"pp": 16}, "the model has 8"),
    ],
)
def test_impossible_layouts_are_refused_with_what_would_fit(layout: dict[str, int], rule: str) -> None:
    with pytest.raises(InputError, match=rule) as refusal:
        small(layout)
    assert refusal.value.nearest
