"""Checks of a machine or slice before a run: chips, versions, storage, clocks, sums, kernels, and real steps."""
