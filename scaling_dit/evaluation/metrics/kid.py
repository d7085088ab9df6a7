"""The metric `kid`: the squared maximum mean discrepancy of Inception features with a cubic kernel."""

import dataclasses
from typing import Any, ClassVar

from scaling_dit.errors import UserError, nearest
from scaling_dit.evaluation.features import influence, kernels, networks
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.set_metric import SetMetric
from scaling_dit.evaluation.features.tables import FeatureTable


@dataclasses.dataclass(frozen=True)
class Kid(SetMetric):
    """KID (arXiv 1801.01401); lower is better, and unlike FID it is not biased by the number of images.

    Memory holds two subsets; features lie on disk. With the same features the numbers are torch-fidelity's.

    Attributes:
      resize: "tensorflow1" as published, or "clean" as in clean-fid.
      subsets: pairs of random subsets, whose mean is the result.
      subset_size: images of each; at most as many as there are on either side.
      choice_seed: seed of the subsets.
    """

    NAME: ClassVar[str] = "kid"

    resize: str = "tensorflow1"
    subsets: int = 100
    subset_size: int = 1000
    choice_seed: int = 2020

    def __post_init__(self) -> None:
        if self.resize not in networks.INCEPTION:
            raise UserError(
                f"metrics.kid.resize is {self.resize!r}; {nearest(self.resize, networks.INCEPTION)}"
            )
        if self.subsets < 1:
            raise UserError(f"metrics.kid.subsets is {self.subsets}; it must be at least 1")

    @property
    def network(self) -> Network:
        """Inception with this rule of resizing."""
        return networks.INCEPTION[self.resize]

    def compare(self, ours: FeatureTable, real: Reference, seed: int) -> dict[str, Any]:
        """`kid`, and `kid_std`, the standard deviation over subsets that papers print beside it.

        The interval is that of other generated images and other subsets.
        """
        choices = {"subsets": self.subsets, "size": self.subset_size, "seed": self.choice_seed}
        table = real.features("kid")
        found = kernels.kid(ours, table, **choices)
        distance = float(found.mean())
        psi = influence.kernel(ours, table, seed, kernels.cubic)
        chance = float(found.var()) / self.subsets
        return {
            "scalars": {"kid": distance, "kid_std": float(found.std())},
            "interval": influence.interval(distance, psi, len(ours), chance),
        }
