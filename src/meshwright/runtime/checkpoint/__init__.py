"""Checkpoints that are saved on one layout of ranks and loaded on any other, bit for bit."""

from meshwright.runtime.checkpoint.pieces import Piece, Pieces, flat_pieces, local_pieces, whole
from meshwright.runtime.checkpoint.rectangles import Rectangle, rectangles

__all__ = ["Piece", "Pieces", "Rectangle", "flat_pieces", "local_pieces", "rectangles", "whole"]
