"""What `meshwright profile` was asked, measured, and how that compares with what was predicted."""

from meshwright.profiling.answer import Asked, ProfileAnswer, profile
from meshwright.profiling.share import ShareAnswer

__all__ = ["Asked", "ProfileAnswer", "ShareAnswer", "profile"]
