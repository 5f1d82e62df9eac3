"""Compiled kernels for the processor: how they are built and loaded; their sources are in csrc/."""
