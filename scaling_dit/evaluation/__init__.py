"""Metrics of generated pictures, by name; each is a `metric.Metric`."""

from scaling_dit.evaluation.metric import Metric
from scaling_dit.evaluation.metrics.digits import DigitAccuracy
from scaling_dit.evaluation.metrics.shapes_tifa import ExactTifa

METRICS: dict[str, Metric] = {"tifa": ExactTifa(), "digits": DigitAccuracy()}
