"""Primitives of the measurements: readings, tables of every state, effects, figures."""
