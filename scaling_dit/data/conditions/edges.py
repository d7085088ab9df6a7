"""The condition "edges": the edges of an image, found by Canny's detector (scikit-image, extra `[edit]`)."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from scaling_dit.data.conditions import contract
from scaling_dit.data.conditions.records import image_of
from scaling_dit.errors import UserError

# ITU-R BT.709 luma.
_LUMA = np.array([0.2126, 0.7152, 0.0722])


@dataclasses.dataclass(frozen=True)
class Edges:
    """White edges on black; a `contract.Condition` without masks.

    Attributes:
      sigma: of the Gaussian that smooths the image first, in pixels.
      low: threshold of the gradient of the luma in [0, 1] above which an edge continues.
      high: threshold above which an edge begins.
    """

    sigma: float = 1.0
    low: float = 0.1
    high: float = 0.2

    masks: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise UserError(f"conditions.edges.sigma is {self.sigma}; it must be 0 or more")
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(
                f"conditions.edges.low and high are {self.low} and {self.high}; they must be in [0, 1], in this order"
            )

    def make(self, record: Mapping[str, Any], generator: np.random.Generator) -> np.ndarray:
        """The edges of the record's image, uint8 [H, W, 3]; nothing about them is random."""
        return as_image(self.find(image_of(record, "edges")))

    def find(self, image: np.ndarray) -> np.ndarray:
        """Where the edges of an image uint8 [H, W, 3] are: bool [H, W]."""
        found: np.ndarray = _canny()(
            luma(image), sigma=self.sigma, low_threshold=self.low, high_threshold=self.high
        )
        return found

    def read(self, files: Sequence[str]) -> np.ndarray:
        """An image of edges as it is, uint8 [H, W, 3]: white lines on black.

        Raises:
          UserError: more than one file, or no image.
        """
        return contract.read_files(files, self.masks)


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> float64 [H, W] in [0, 1]."""
    grey: np.ndarray = image.astype(np.float64) @ _LUMA / 255
    return grey


def as_image(edges: np.ndarray) -> np.ndarray:
    """bool [H, W] -> uint8 [H, W, 3], white where True."""
    return np.repeat(np.where(edges, np.uint8(255), np.uint8(0))[..., None], 3, axis=-1)


def is_installed() -> bool:
    """Whether scikit-image is there."""
    return importlib.util.find_spec("skimage") is not None


def _canny() -> Any:
    try:
        from skimage.feature import canny
    except ImportError:
        raise UserError("condition 'edges' needs scikit-image: pip install 'scaling-dit[edit]'") from None
    return canny
