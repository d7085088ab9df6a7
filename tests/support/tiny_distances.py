"""Two metrics of a network small enough for any test: means of colours of real and generated images compared."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.published import Published
from scaling_dit.evaluation.features.set_metric import SetMetric
from scaling_dit.evaluation.features.sharded import Sharded


def build(place, batch):
    """Features of each image: the mean and the spread of its colours."""

    def features(params, images):
        scaled = images.astype(jnp.float32) * params
        return jnp.concatenate([scaled.mean((1, 2)), scaled.std((1, 2))], axis=-1)

    return Sharded(features, jnp.float32(1 / 255), batch)


NETWORK = Network("colours", 6, Published(("colours",), "nowhere"), "none", build)


@dataclasses.dataclass(frozen=True)
class Nearer(SetMetric):
    """Squared distance of the mean features."""

    NAME: ClassVar[str] = "tests.support.tiny_distances:Nearer"
    network = NETWORK

    def compare(self, ours, real, seed):
        means = [np.concatenate(list(table.blocks())).mean(0) for table in (ours, real.features(self.NAME))]
        return {"scalars": {"nearer": float(((means[0] - means[1]) ** 2).sum())}, "interval": [0.0, 1.0]}


@dataclasses.dataclass(frozen=True)
class Wider(SetMetric):
    """Ratio of the spreads of the features."""

    NAME: ClassVar[str] = "tests.support.tiny_distances:Wider"
    network = NETWORK

    def compare(self, ours, real, seed):
        spreads = [np.concatenate(list(t.blocks())).std(0).mean() for t in (ours, real.features(self.NAME))]
        return {"scalars": {"wider": float(spreads[0] / spreads[1])}, "interval": [0.0, 9.0]}
