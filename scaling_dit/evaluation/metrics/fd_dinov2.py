"""The metric `fd_dinov2`: the Frechet distance between the DINOv2 features of generated and of real images."""

import dataclasses
from typing import Any, ClassVar

from scaling_dit.evaluation.features import gaussians, networks
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.set_metric import SetMetric
from scaling_dit.evaluation.features.tables import FeatureTable


@dataclasses.dataclass(frozen=True)
class FdDinov2(SetMetric):
    """FD-DINOv2 (arXiv 2306.04675) by ViT-L/14 at 224 px, which agrees better with people than FID; lower is better.

    Attributes:
      points: numbers of images of which the distance is computed too, for its extrapolation; 0 = none.
      resamples: bootstrap samples of the images for an interval, each as costly as the distance itself; 0 = none.
    """

    NAME: ClassVar[str] = "fd_dinov2"

    points: int = 5
    resamples: int = 0

    def __post_init__(self) -> None:
        gaussians.check_fields("fd_dinov2", self.points, self.resamples)

    @property
    def network(self) -> Network:
        """DINOv2 ViT-L/14."""
        return networks.DINOV2_L

    def compare(self, ours: FeatureTable, real: Reference, seed: int) -> dict[str, Any]:
        """`fd_dinov2`, `fd_dinov2_infinity`, and the distances of fewer images."""
        options = {"points": self.points, "resamples": self.resamples}
        return gaussians.compare("fd_dinov2", ours, real.gaussian, seed, **options)
