"""A plan's steps under torch's profiler: labels of collectives and modules, traces, the peak of memory."""

from meshwright.runtime.profile.session import Profiled, Session, profile_plan

__all__ = ["Profiled", "Session", "profile_plan"]
