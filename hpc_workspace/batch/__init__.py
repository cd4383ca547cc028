"""Batch evaluation: one agent over many tasks, each attempt in a workspace of its own, through an array of pilots."""

from hpc_workspace.batch.evaluate import evaluate
from hpc_workspace.batch.outcomes import FAILURE_CLASSES
from hpc_workspace.batch.report import Report, derive

__all__ = ["evaluate", "Report", "derive", "FAILURE_CLASSES"]
