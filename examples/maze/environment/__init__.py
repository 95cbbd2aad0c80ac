"""Procgen, pairs of levels, and levels as an environment."""
