"""Batch evaluation: one agent over many tasks, each in a workspace of its own, through an array of pilots."""

from hpc_workspace.batch.evaluate import Report, evaluate

__all__ = ["evaluate", "Report"]
