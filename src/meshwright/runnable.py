"""What the native engine runs, and what has to be installed for it: asked before anything starts."""

from __future__ import annotations

from importlib.util import find_spec

from meshwright.errors import InputError, MeshwrightError
from meshwright.plan import Plan
from meshwright.verify import require_valid

TORCH = ("torch",)
TRAINING = ("torch", "numpy", "datasets", "tokenizers", "tensorboard")
"""Libraries of the extra `train`."""


def require_installed(what: str, names: tuple[str, ...]) -> None:
    """Raise MeshwrightError where a library that something needs is not installed: planning does without."""
    for name in names:
        if find_spec(name) is None:
            raise MeshwrightError(f"{what} needs {name}: pip install 'meshwright[train]'")


def require_runnable(plan: Plan) -> None:
    """Raise InputError for a plan that no engine could run, or that is not for the native one, or that the
    native runtime does not build."""
    if plan.policy.engine != "native":
        rule = "meshwright runs its own engine, and plans for others"
        raise InputError("policy.engine", plan.policy.engine, rule, ["native"])
    if plan.layout.pp == 1 and plan.layout.vpp > 1:
        raise InputError("layout.vpp", plan.layout.vpp, "one pipeline rank has nothing to interleave", [1])
    _require_positions(plan)
    require_valid(plan)


def _require_positions(plan: Plan) -> None:
    """Raise InputError for positions that the model has no numbers for, or cannot rotate by."""
    model, longest = plan.model, plan.workload.max_sequence_length
    if model.position == "learned" and longest > (model.max_position_embeddings or 0):
        rule = f"at most max_position_embeddings = {model.max_position_embeddings}: positions are learned"
        raise InputError("workload.sequence_length", longest, rule, [model.max_position_embeddings])
    rotated = int(model.qk_head_dim * model.partial_rotary_factor)
    if model.position == "rope" and rotated % 2:
        rule = f"rotary positions turn pairs, and {rotated} of a head's {model.qk_head_dim} dims are odd"
        near = [model.qk_head_dim + 1] if model.partial_rotary_factor == 1 else []
        raise InputError("model.head_dim", model.qk_head_dim, rule, near)
