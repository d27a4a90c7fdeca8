"""Scale down: a plan shrunk to what one machine trains, with everything in which it differs."""

from meshwright.scale_down.small import ScaledDown, scaled_down

__all__ = ["ScaledDown", "scaled_down"]
