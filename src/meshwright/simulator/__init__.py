"""Iterations as events: what a closed form cannot see."""
