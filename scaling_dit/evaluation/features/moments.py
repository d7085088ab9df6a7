"""Means and covariances of features in float64, which merge, and the Frechet distance between two Gaussians.

A state holds the count `n`, the `mean` [D], and the `scatter` [D, D], the sum of outer products of deviations from the
mean. It does not grow with the number of images. States merge by the update of Chan et al. (1979), which does not
subtract large numbers from each other.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import State


def empty(width: int) -> State:
    """The state before the first image."""
    return {"n": np.zeros((), np.int64), "mean": np.zeros(width), "scatter": np.zeros((width, width))}


def of(features: np.ndarray, counts: np.ndarray | None = None) -> State:
    """The state of features [N, D], each taken as often as `counts` [N] says; once by default."""
    x = np.asarray(features, np.float64)
    if counts is None:
        counts = np.ones(len(x), np.int64)
    number = int(counts.sum())
    if not number:
        return empty(x.shape[1])
    mean = counts @ x / number
    deviations = x - mean
    return {
        "n": np.asarray(number),
        "mean": mean,
        "scatter": deviations.T @ (counts[:, None] * deviations),
    }


def merge(one: State, other: State) -> State:
    """The state of the images of both."""
    if not one["n"] or not other["n"]:
        return other if not one["n"] else one
    total = one["n"] + other["n"]
    apart = other["mean"] - one["mean"]
    share = other["n"] / total
    scatter = one["scatter"] + other["scatter"] + (one["n"] * share) * np.outer(apart, apart)
    return {"n": np.asarray(total), "mean": one["mean"] + share * apart, "scatter": scatter}


def of_blocks(blocks: Iterable[np.ndarray], width: int) -> State:
    """The state of blocks of features [some, D], one after the other."""
    return functools.reduce(merge, map(of, blocks), empty(width))


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean [D] and covariance [D, D] in float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, state: State) -> "Gaussian":
        """Of a state, with the unbiased covariance, as `numpy.cov` and the published FID have it.

        Raises:
          UserError: fewer than two images.
        """
        if state["n"] < 2:
            raise UserError(f"a covariance needs at least 2 images, here {int(state['n'])}")
        return cls(state["mean"], state["scatter"] / (state["n"] - 1))

    @functools.cached_property
    def root(self) -> np.ndarray:
        """The symmetric square root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def frechet(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the FID of two sets of features (arXiv 1706.08500, eq. 6).

    The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2), whose computation is stable where there
    are fewer images than features. `other` is the reference: its root is computed once.
    """
    apart = one.mean - other.mean
    inner = np.linalg.eigvalsh(other.root @ one.covariance @ other.root)
    roots = np.sqrt(np.maximum(inner, 0)).sum()
    return float(apart @ apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * roots)


def extrapolate(counts: Sequence[int], distances: Sequence[float]) -> float:
    """The distance at infinitely many images: the line through (1 / N, distance) at 0 (arXiv 1911.07023, section 4).

    The distance of N images is too large by about c / N, where c depends on the model, so that models may change ranks.
    """
    _, intercept = np.polyfit(1 / np.asarray(counts, np.float64), np.asarray(distances, np.float64), 1)
    return float(intercept)
