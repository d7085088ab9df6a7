"""The metric `cmmd`: the maximum mean discrepancy of CLIP embeddings with a Gaussian kernel."""

import dataclasses
from typing import Any, ClassVar

from scaling_dit.evaluation.features import influence, kernels, networks
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.set_metric import SetMetric
from scaling_dit.evaluation.features.tables import FeatureTable


@dataclasses.dataclass(frozen=True)
class Cmmd(SetMetric):
    """CMMD (arXiv 2401.09603) by CLIP ViT-L/14 at 336 px; lower is better, and a few thousand images are enough.

    Exact over all pairs of images: time grows with the square of their number, memory does not grow.
    """

    NAME: ClassVar[str] = "cmmd"

    @property
    def network(self) -> Network:
        """CLIP's image tower of ViT-L/14 at 336 px."""
        return networks.CLIP_L_336

    def compare(self, ours: FeatureTable, real: Reference, seed: int) -> dict[str, Any]:
        """`cmmd`, with an interval of other generated images."""
        table = real.features("cmmd")
        distance = kernels.cmmd(ours, table, other_mean=real.kernel_mean)
        psi = influence.kernel(ours, table, seed, kernels.nearness, kernels.SCALE)
        return {"scalars": {"cmmd": distance}, "interval": influence.interval(distance, psi, len(ours))}
