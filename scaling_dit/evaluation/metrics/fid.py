"""The metric `fid`: the Frechet distance between the Inception features of generated and of real images."""

import dataclasses
from typing import Any, ClassVar

from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.features import gaussians, networks
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.set_metric import SetMetric
from scaling_dit.evaluation.features.tables import FeatureTable


@dataclasses.dataclass(frozen=True)
class Fid(SetMetric):
    """FID (arXiv 1706.08500) by the weights of 2015-12-05; lower is better.

    Attributes:
      resize: "tensorflow1" as published and as in torch-fidelity, or "clean" as in clean-fid.
      points: numbers of images of which FID is computed too, for its extrapolation to infinitely many; 0 = none.
      resamples: bootstrap samples of the images for an interval, each as costly as FID itself; 0 = none.
    """

    NAME: ClassVar[str] = "fid"

    resize: str = "tensorflow1"
    points: int = 5
    resamples: int = 0

    def __post_init__(self) -> None:
        if self.resize not in networks.INCEPTION:
            raise UserError(
                f"metrics.fid.resize is {self.resize!r}; {nearest(self.resize, networks.INCEPTION)}"
            )
        gaussians.check_fields("fid", self.points, self.resamples)

    @property
    def network(self) -> Network:
        """Inception with this rule of resizing."""
        return networks.INCEPTION[self.resize]

    def compare(self, ours: FeatureTable, real: Reference, seed: int) -> dict[str, Any]:
        """`fid`, `fid_infinity`, and the distances of fewer images."""
        return gaussians.compare(
            "fid", ours, real.gaussian, seed, points=self.points, resamples=self.resamples
        )
