"""Graphs with one op taken out or changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from binding import stem

from meshwright.ir import program as lowered
from meshwright.ir.graph import Block, Op

Change = Callable[[Op], Op | None]


def change_ops(patch: pytest.MonkeyPatch, name: str, change: Change) -> None:
    """Change the ops of a name in every block; None takes them out."""
    for build_block in ("layer_block", "embedding_block", "head_block"):
        original = getattr(lowered, build_block)

        def block(*args: Any, original: Any = original) -> Block:
            made = original(*args)
            nodes = []
            for node in made.nodes:
                if isinstance(node, Op) and stem(node.name) == name:
                    other = change(node)
                    nodes += [] if other is None else [other]
                else:
                    nodes.append(node)
            return Block(made.name, tuple(nodes))

        patch.setattr(lowered, build_block, block)
