"""What stands behind a price: measured curves of kernels and links, and how far each reaches."""

from __future__ import annotations

from typing import Literal

Basis = Literal["measured", "interpolated", "assumed"]
"""Where a figure comes from: a shape within what was measured, one beyond it on a measured curve, or none."""
