"""Runs of the study, and its report."""
