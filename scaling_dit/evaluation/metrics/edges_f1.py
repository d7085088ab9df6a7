"""The metric `edges_f1`: whether the edges of an image are those it was made from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from scaling_dit.data.conditions import edges as edges_lib
from scaling_dit.data.sources import Source
from scaling_dit.errors import UserError
from scaling_dit.evaluation import conditioned
from scaling_dit.evaluation.bases import PerImage, held_out_items, no_prompt_set
from scaling_dit.evaluation.metric import Batch, Item, Items, Row, Rows, Skipped, State

# Of SSIM (Wang et al., 2004) for values in [0, 1].
_C1, _C2 = 0.01**2, 0.03**2
_SIGMA = 1.5


@dataclasses.dataclass(frozen=True)
class EdgesF1(PerImage):
    """F1 of Canny edges of the image against those it was given, and SSIM of both edge maps.

    An edge pixel counts as found if the other map has one at most `tolerance` pixels away, along rows, columns and
    diagonals. Where neither map has an edge, F1 is 1.

    Attributes:
      sigma: of the detector, as the field of the condition "edges"; the prompts' edges are found with it, too, whatever
        the run was trained with.
      low: as `sigma`.
      high: as `sigma`.
      tolerance: in pixels.
      condition: the name of the condition that is the edges.
    """

    NAME = "edges_f1"

    sigma: float = 1.0
    low: float = 0.1
    high: float = 0.2
    tolerance: int = 1
    condition: str = "edges"

    def __post_init__(self) -> None:
        _ = self._detector
        if self.tolerance < 0:
            raise UserError(f"metrics.edges_f1.tolerance is {self.tolerance}; it must be 0 or more")

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """The first captions of the first `count` held-out records, with the edges of their images as condition.

        Raises:
          UserError: fewer records are held out, or they are of a prepared set.
          Skipped: scikit-image is not installed.
        """
        if not edges_lib.is_installed():
            raise Skipped("scikit-image is not installed; pip install 'scaling-dit[edit]'")
        found, detector = held_out_items(source, count), self._detector

        def make(number: int) -> Item:
            item = found[number]
            if item.truth is None:
                raise UserError(
                    f"metric 'edges_f1' needs images, which a prepared set has not: {source.describe()}"
                )
            edges = edges_lib.as_image(detector.find(item.truth))
            return dataclasses.replace(item, conditions={self.condition: edges})

        return Items(count, make)

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Makes sure that items of a prompt set have edges; raises UserError."""
        if items and self.condition not in items[0].conditions:
            raise no_prompt_set(where, f"condition {self.condition!r}", "edges_f1", "any images")

    def rows(self, batch: Batch) -> Sequence[Row]:
        """For each image F1 as `score`, `precision`, `recall` and `ssim`.

        Raises:
          UserError: an image of another size than its edges.
        """
        rows = []
        for image, item in zip(batch.images, batch.items, strict=True):
            wanted = item.conditions[self.condition][..., 0] > 127
            if image.shape[:2] != wanted.shape:
                size, right = (f"{shape[1]}x{shape[0]}" for shape in (image.shape, wanted.shape))
                raise UserError(
                    f"the image of {item.id!r} has {size} pixels and its edges {right}; give images of that size"
                )
            found = self._detector.find(image)
            precision, recall, f1 = overlap(found, wanted, self.tolerance)
            rows.append({"score": f1, "precision": precision, "recall": recall, "ssim": ssim(found, wanted)})
        return rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """The means, with the interval of F1."""
        result = super().result(state, rows, seed)
        for name in ("ssim", "precision", "recall"):
            result["scalars"][f"{self.NAME}_{name}"] = float(rows.column(name).mean())
        return result | {"n": len(rows)}

    def about(self) -> dict[str, Any]:
        """The detector."""
        return {"judge": "Canny (scikit-image) of the luma, at the image's own size"}

    @property
    def _detector(self) -> edges_lib.Edges:
        with conditioned.own_fields(self.NAME, "edges"):
            return edges_lib.Edges(self.sigma, self.low, self.high)


def overlap(found: np.ndarray, wanted: np.ndarray, tolerance: int) -> tuple[float, float, float]:
    """(precision, recall, F1) of edges bool [H, W], where those of the other map are hit within `tolerance` pixels."""
    near = np.ones((2 * tolerance + 1, 2 * tolerance + 1), bool)
    if not found.any() and not wanted.any():
        return 1.0, 1.0, 1.0
    hit = found & ndimage.binary_dilation(wanted, near)
    met = wanted & ndimage.binary_dilation(found, near)
    precision = float(hit.sum() / found.sum()) if found.any() else 0.0
    recall = float(met.sum() / wanted.sum()) if wanted.any() else 0.0
    both = precision + recall
    return precision, recall, 2 * precision * recall / both if both else 0.0


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """The mean structural similarity of two maps [H, W] in [0, 1], with Gaussian windows of sigma 1.5 (Wang et al.)."""

    def mean(values: np.ndarray) -> np.ndarray:
        smoothed: np.ndarray = ndimage.gaussian_filter(values, _SIGMA, truncate=3.5)
        return smoothed

    x, y = one.astype(np.float64), other.astype(np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    value = (2 * mx * my + _C1) * (2 * cov + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return float(value.mean())
