"""The factors of a sampler whose steps are sums: one row a model call, noisiest first. See `published_samplers.py`."""

from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

Column = TypeVar("Column", np.ndarray, jax.Array)


class Linear(NamedTuple, Generic[Column]):
    """Each [S], or [] in one row: what the model sees, the factors of the next latents, and what is remembered."""

    timesteps: Column
    alpha: Column
    sigma: Column
    # Of the latents before the model sees them.
    scale: Column
    # Of the latents, the clean latents and the noise that the model sees, and fresh noise.
    keep: Column
    x0: Column
    eps: Column
    noise: Column
    # Of the three values that were remembered last, the newest first.
    first: Column
    second: Column
    third: Column
    # The value to remember, as factors of clean latents and noise, and whether to.
    value_x0: Column
    value_eps: Column
    remember: Column


def new_table(
    timesteps: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, **factors: np.ndarray
) -> Linear[np.ndarray]:
    """A table with these factors; others are 0, but that latents are not scaled and all values are remembered."""
    rows = len(timesteps)
    default = {"scale": 1.0, "remember": 1.0}
    named = {"timesteps": timesteps, "alpha": alpha, "sigma": sigma, **factors}
    return Linear(**{name: named.get(name, np.full(rows, default.get(name, 0.0))) for name in Linear._fields})
