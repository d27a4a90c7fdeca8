"""A dry run: every rank of a plan built and run without memory, and held against the plan's graph."""

from meshwright.dryrun.answer import Answer
from meshwright.dryrun.checks import Check
from meshwright.dryrun.command import Asked, answered

__all__ = ["Answer", "Asked", "Check", "answered"]
