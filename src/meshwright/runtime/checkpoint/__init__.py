"""Checkpoints that are saved on one layout of ranks and loaded on any other, bit for bit."""

from meshwright.runtime.checkpoint.folder import Found, survey
from meshwright.runtime.checkpoint.pieces import Piece, Pieces, flat_pieces, local_pieces, whole
from meshwright.runtime.checkpoint.rectangles import Rectangle, rectangles
from meshwright.runtime.checkpoint.store import described, load, newest, save

__all__ = [
    "Found",
    "Piece",
    "Pieces",
    "Rectangle",
    "described",
    "flat_pieces",
    "load",
    "local_pieces",
    "newest",
    "rectangles",
    "save",
    "survey",
    "whole",
]
