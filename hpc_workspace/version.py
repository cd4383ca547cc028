"""The version of this distribution, read by the build and by `hpc-workspace --version`."""

__version__ = "0.1.0"
