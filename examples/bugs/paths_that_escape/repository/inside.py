"""Paths that stay where they belong."""

import os


def is_inside(root, path):
    """Whether `path`, taken from `root`, stays in it."""
    full = os.path.normpath(os.path.join(root, path))
    return full.startswith(os.path.normpath(root))
