"""Evaluation of a model: the validation loss, and metrics of generated images, by name in `METRICS`."""

from scaling_dit.evaluation.registry import METRICS

__all__ = ["METRICS"]
