"""Scaling studies: what a model costs, and how quality follows from it."""
