"""The memory of one rank, line by line, from what it holds. Elementwise: one plan, or arrays over layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.cost.parts import (
    BlockBytes,
    Setting,
    bucket_bytes,
    context_bytes,
    gathered_bytes,
    gradient_share_bytes,
    pipeline_buffer_bytes,
    placeholder_bytes,
    slack_bytes,
    states,
    transient_bytes,
    whole_copies,
)
from meshwright.ir.holding import Holding

SLACK = "allocator slack"
CONTEXT = "runtime context"


@dataclass(frozen=True, slots=True)
class RankContent:
    """What a rank holds.

    `held_bytes`: what micro-batches in flight keep at the fullest moment; `blocks`: one of each kind of block
    that the rank has; `params`: its parameters, of which `largest_block` counts those of the largest block
    and `stages` lists those of each stage; `sends_bytes`: what it sends to neighbouring stages.
    """

    held_bytes: int
    blocks: Sequence[BlockBytes]
    params: Holding
    largest_block: int
    stages: Sequence[Holding]
    sends_bytes: int


def fixed_lines(
    setting: Setting, content: RankContent, num_micro_batches: int, dp_cp: int, edp: int
) -> dict[str, int]:
    """Bytes of every line of a rank but those in flight, by name; with the allocator's slack on them all."""
    remade, gradients, exchanged = transient_bytes(setting, content.blocks)
    whole = [whole_copies(setting, stage, dp_cp, edp) for stage in content.stages]
    lines = {name: part.total for name, part in states(setting, content.params, num_micro_batches).items()}
    lines |= {
        "recomputed activations": remade,
        "activation gradients": gradients,
        "expert dispatch buffers": exchanged,
        "gradient placeholders": placeholder_bytes(setting, content.blocks),
        "gradient shares": gradient_share_bytes(setting, content.params, dp_cp, edp),
        "pipeline buffers": pipeline_buffer_bytes(setting, content.sends_bytes, num_micro_batches),
        "gathered parameters": gathered_bytes(setting, content.largest_block, whole),
        "gradient bucket": bucket_bytes(setting, content.largest_block, dp_cp),
    }
    lines[SLACK] = slack_bytes(setting, sum(lines.values()) + content.held_bytes)
    lines[CONTEXT] = context_bytes(setting)
    return lines


def total_bytes(setting: Setting, content: RankContent, num_micro_batches: int, dp_cp: int, edp: int) -> int:
    """Peak bytes of a rank."""
    return content.held_bytes + sum(fixed_lines(setting, content, num_micro_batches, dp_cp, edp).values())
