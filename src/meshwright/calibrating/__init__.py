"""What `meshwright calibrate` was asked: which shapes to measure, what the constants come out as, what of a
plan the table covers."""

from meshwright.calibrating.answer import Asked, Calibrated, Covered, calibrate

__all__ = ["Asked", "Calibrated", "Covered", "calibrate"]
