"""The metric `mind`: the sliced Wasserstein distance between Inception features of generated and of real images."""

import dataclasses
from typing import Any, ClassVar

from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.features import influence, kernels, networks
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.set_metric import SetMetric
from scaling_dit.evaluation.features.tables import FeatureTable


@dataclasses.dataclass(frozen=True)
class Mind(SetMetric):
    """MIND, the Monge Inception Distance (arXiv 2605.06797); lower is better.

    Sees all of both distributions, where FID sees means and covariances. With the same features the number is
    torch-fidelity's.

    Attributes:
      resize: "tensorflow1" as in torch-fidelity, or "clean" as in clean-fid.
      directions: random directions that features are projected to.
      choice_seed: seed of the directions, and of the subset of the larger side.
    """

    NAME: ClassVar[str] = "mind"

    resize: str = "tensorflow1"
    directions: int = 1000
    choice_seed: int = 2020

    def __post_init__(self) -> None:
        if self.resize not in networks.INCEPTION:
            raise UserError(
                f"metrics.mind.resize is {self.resize!r}; {nearest(self.resize, networks.INCEPTION)}"
            )
        if self.directions < 1:
            raise UserError(f"metrics.mind.directions is {self.directions}; it must be at least 1")

    @property
    def network(self) -> Network:
        """Inception with this rule of resizing."""
        return networks.INCEPTION[self.resize]

    def compare(self, ours: FeatureTable, real: Reference, seed: int) -> dict[str, Any]:
        """`mind`, with an interval of other generated images."""
        choices = {"directions": self.directions, "seed": self.choice_seed}
        distance, psi = kernels.sliced(ours, real.features("mind"), **choices)
        return {"scalars": {"mind": distance}, "interval": influence.interval(distance, psi, len(psi))}
