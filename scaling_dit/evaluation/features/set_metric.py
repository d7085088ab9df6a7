"""The base of metrics that compare the features of generated images with those of real ones, as two sets.

Features are kept in the rows, which lie on disk part by part. At the end they are read into a table of features, also
on disk, so that memory does not grow with the number of images. On disk an image takes 4 bytes a feature, twice.
"""

import dataclasses
import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.data.sources import Source, create_source, source_fields
from scaling_dit.errors import UserError
from scaling_dit.evaluation.bases import Base
from scaling_dit.evaluation.features import published, references
from scaling_dit.evaluation.features.image_folder import ImageFolder
from scaling_dit.evaluation.features.networks import Network
from scaling_dit.evaluation.features.references import Reference
from scaling_dit.evaluation.features.tables import BLOCK, FeatureTable
from scaling_dit.evaluation.metric import Batch, Item, Row, Rows, Skipped, State
from scaling_dit.evaluation.registry import Chosen

TRUTHS = "the real images of the same prompts, from the run's own data"


@dataclasses.dataclass(frozen=True)
class SetMetric(Base):
    """A metric of two sets; a subclass gives `network` and `compare`.

    Attributes:
      weights: file or folder of the network's weights; "" looks in $SCALING_DIT_WEIGHTS.
      reference: statistics of real images, a file or a folder that `evaluate --reference` wrote; "" compares with the
        real images of the same prompts.
      batch: images at once.
    """

    # As it is registered.
    NAME: ClassVar[str]

    weights: str = ""
    reference: str = ""
    batch: int = 64

    @property
    def network(self) -> Network:
        """The network whose features are compared."""
        raise NotImplementedError

    def compare(self, ours: FeatureTable, real: Reference, seed: int) -> dict[str, Any]:
        """The result: `scalars`, and whatever else is worth keeping."""
        raise NotImplementedError

    def with_reference(self, reference: str, image_size: int, folder: epath.Path) -> Self:
        """This metric with statistics to compare with, which are built if `reference` names a source.

        Args:
          reference: a file or folder of statistics, a folder of images, or a source such as "webdataset:/data/*.tar",
            of which all images are taken, both splits.
          image_size: height and width that a source's images are brought to.
          folder: where statistics that are built are kept for other metrics and calls.

        Raises:
          Skipped: the weights are missing.
          UserError: no such statistics or source, or statistics of something else.
        """
        # A source expands the path in its name itself.
        if ":" not in reference.partition("://")[0]:
            reference = files.expand(reference)
        path = epath.Path(reference)
        if path.exists() and not references.is_folder_of_images(path):
            return dataclasses.replace(self, reference=reference)
        weights = self._place()
        source = _open_source(reference, image_size)
        if source.image_size != image_size:
            raise UserError(
                f"{source.describe()}: its images are to be compared with images of {image_size} px"
            )
        tag = hashlib.sha256(f"{reference} {image_size}".encode()).hexdigest()[:12]
        built = folder / tag / f"{self.network.name}{references.SUFFIX}"
        references.build(source, reference, self.network, weights, built, batch=self.batch)
        return dataclasses.replace(self, reference=str(built))

    def check_ready(self) -> None:
        """Finds the weights; raises Skipped if they are missing."""
        self._place()

    def items(self, source: Source, count: int) -> Sequence[Item]:
        """Held-out captions with their images, once the weights and the reference are found.

        Raises:
          Skipped: the weights are missing.
          UserError: the reference is of another network, or the source has no images to compare with.
        """
        self._place()
        items = super().items(source, count)
        self.check_items(items, source.describe())
        return items

    def check_items(self, items: Sequence[Item], where: str) -> None:
        """Makes sure that there is something to compare with.

        Args:
          where: the prompts are from, for the error line.

        Raises:
          UserError: as `items`.
        """
        if self.reference:
            self._reference()
        elif items[0].truth is None:
            raise UserError(
                f"metric {self.NAME!r}: {where} holds no images to compare with; give --reference"
            )

    def tower(self) -> tuple[Hashable, ...]:
        """The network with its weights, see `Metric`."""
        return self.network.name, self._place(), self.batch

    def update(self, state: State, batch: Batch) -> tuple[State, Sequence[Row]]:
        """Rows with `features`, and with `real` where there is no reference; nothing is accumulated."""
        features = self.network.open(self._place(), self.batch)
        rows: list[Row] = [{"features": row} for row in features(batch.images)]
        if not self.reference:
            truths = [item.truth for item in batch.items if item.truth is not None]
            if len(truths) < len(rows):
                raise UserError(f"metric {self.NAME!r}: the prompts have no real images; give --reference")
            for row, real in zip(rows, features(np.stack(truths)), strict=True):
                row["real"] = real
        return state, rows

    def result(self, state: State, rows: Rows, seed: int) -> dict[str, Any]:
        """What `compare` gives, with the number of images on each side; None where it is not known."""
        width = self.network.width
        ours = FeatureTable.spill(_blocks(rows, "features"), width)
        if self.reference:
            real = self._reference()
        else:
            real = Reference.of_table(FeatureTable.spill(_blocks(rows, "real"), width))
        counts = {"n": len(ours), "n_reference": real.count or None}
        return counts | self.compare(ours, real, seed)

    def about(self) -> dict[str, Any]:
        """The weights' checksum, how images are resized, and what they are compared with."""
        real: Mapping[str, Any] = self._reference().about() if self.reference else {"images": TRUTHS}
        return {
            "network": self.network.name,
            "weights_sha256": published.digest(self._place()),
            "resize": self.network.resize,
            "reference": dict(real),
        }

    def _place(self) -> str:
        return self.network.weights.find(self.weights, self.NAME)

    def _reference(self) -> Reference:
        return references.open_reference(self.reference, self.network, published.digest(self._place()))


def _open_source(reference: str, image_size: int) -> Source:
    """All images that `--reference` names, at this size."""
    if epath.Path(reference).exists():
        return ImageFolder(reference, image_size)
    if ":" not in reference or "://" in reference:
        raise UserError(
            f"no reference {reference}; give statistics, a folder of images, or a source such as folder:/data/coco"
        )
    known = source_fields(reference)
    fields = {"image_size": image_size, "held_out_fraction": 0.0}
    return create_source(reference, **{key: value for key, value in fields.items() if key in known})


def _blocks(rows: Rows, key: str) -> Iterator[np.ndarray]:
    """One array of the rows, some at a time."""
    held: list[np.ndarray] = []
    for row in rows:
        held.append(row[key])
        if len(held) == BLOCK:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)


def compared_with(
    chosen: Sequence[Chosen], reference: str, image_size: int, folder: epath.Path
) -> list[Chosen]:
    """The metrics of a command; those that compare with real images have this reference, see `with_reference`.

    A metric whose weights are missing stays as it is, and is skipped when it is asked for its items.

    Raises:
      UserError: none of them compares with real images, or as `with_reference`.
    """
    found = []
    for one in chosen:
        if isinstance(one.metric, SetMetric):
            try:
                metric = one.metric.with_reference(reference, image_size, folder)
            except Skipped:
                metric = one.metric
            one = dataclasses.replace(
                one, metric=metric, fields={**one.fields, "reference": metric.reference}
            )
        found.append(one)
    if not any(isinstance(one.metric, SetMetric) for one in found):
        raise UserError(
            f"--reference: none of {', '.join(one.name for one in chosen)} compares with real images"
        )
    return found
