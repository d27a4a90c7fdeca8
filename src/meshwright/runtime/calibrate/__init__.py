"""Measuring the machine at hand: ops as the runtime runs them, collectives of local ranks, small steps."""

from meshwright.runtime.calibrate.measure import Job, Measured, measure_locally
from meshwright.runtime.calibrate.subjects import Shape, Surroundings

__all__ = ["Job", "Measured", "Shape", "Surroundings", "measure_locally"]
