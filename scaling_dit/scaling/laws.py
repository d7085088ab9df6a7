"""Scaling laws: how loss or a metric follows from parameters, samples and compute.

Each function fits one law to arrays of points and returns it with the warnings that a reader needs. Intervals are
bootstraps over whole runs (`bootstrap.py`), computed when they are first asked for. Points that cannot be fitted are
refused with the reason.
"""

from scaling_dit.scaling.curves import Curve, power_law, saturating
from scaling_dit.scaling.isoflop import Envelope, IsoFlop, envelope, isoflop, pareto
from scaling_dit.scaling.parametric import ParametricLaw, fit_parametric

__all__ = [
    "Curve",
    "Envelope",
    "IsoFlop",
    "ParametricLaw",
    "envelope",
    "fit_parametric",
    "isoflop",
    "pareto",
    "power_law",
    "saturating",
]
