"""The images that a request is sampled with: conditions of the backbone, and an image to start from."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from etils import epath

from scaling_dit.data import images
from scaling_dit.data.conditions import contract
from scaling_dit.errors import UserError, nearest
from scaling_dit.model.model import Model
from scaling_dit.sampling.options import SamplingOptions


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Images for prompts, checked against a model.

    Attributes:
      conditions: name -> uint8 [H, W, 3 + masks] for every prompt, or [N, H, W, 3 + masks] with one for each.
      image: to start from, uint8 [H, W, 3] or [N, H, W, 3]; None for none.
    """

    conditions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    image: np.ndarray | None = None

    @classmethod
    def of(
        cls, model: Model, conditions: Mapping[str, Any] | None, image: Any | None, count: int | None = None
    ) -> Self:
        """From a user's arrays.

        Args:
          model: that reads them.
          conditions, image: as the attributes.
          count: N; None where only arrays for every prompt are right.

        Raises:
          UserError: a condition that the model does not read, or an array of another shape or type.
        """
        if conditions is not None and not isinstance(conditions, Mapping):
            raise UserError(
                f"conditions is a {type(conditions).__name__}; it must be a mapping from names to images"
            )
        known = {one.name: one.condition for one in model.conditions}
        checked = {}
        for name, array in (conditions or {}).items():
            check_name(name, model)
            where = f"condition {name!r}"
            checked[name] = _check(array, model.image_size, known[name].masks, count, where)
            checked[name] = contract.hidden(known[name], checked[name], where)
        if image is not None:
            image = _check(image, model.image_size, 0, count, "image")
        return cls(checked, image)

    @classmethod
    def read(cls, model: Model, conditions: Sequence[str], image: str | None) -> Self:
        """From a user's files: `conditions` are NAME:FILE or NAME:IMAGE,MASK, as flags give them.

        Raises:
          UserError: as `of`, and as `data.conditions.contract.read`.
        """
        readers = {one.name: one.condition for one in model.conditions}
        found: dict[str, np.ndarray] = {}
        for text in conditions:
            name, colon, files = text.partition(":")
            if not (colon and files):
                raise UserError(
                    f"--condition={text}: write NAME:FILE, or NAME:IMAGE,MASK where it has a mask"
                )
            check_name(name, model)
            if name in found:
                raise UserError(f"--condition={text}: condition {name!r} is given twice")
            found[name] = contract.read(readers[name], name, files.split(","), model.image_size)
        start = None
        if image:
            path = epath.Path(image)
            start = np.asarray(images.decode(images.read_bytes(path, "--image"), "--image", path.name))
        return cls.of(model, found, start)

    def rows(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Arguments of a `Sampler` for the prompts of these numbers."""
        found: dict[str, Any] = {}
        if self.conditions:
            found["conditions"] = {name: _rows(one, numbers) for name, one in self.conditions.items()}
        if self.image is not None:
            found["image"] = _rows(self.image, numbers)
        return found

    def about(self) -> dict[str, Any]:
        """What manifests say of them: sha256 of the pixels; {} of a request without images."""
        found: dict[str, Any] = {}
        if self.conditions:
            found["conditions"] = {name: _digest(one) for name, one in sorted(self.conditions.items())}
        if self.image is not None:
            found["image"] = _digest(self.image)
        return found

    def check(self, options: SamplingOptions, model: Model, more: Collection[str] = ()) -> None:
        """Makes sure that the options have what they act on, before anything is sampled or written.

        Args:
          options: of the request.
          model: that samples.
          more: names of conditions that each prompt has for itself.

        Raises:
          UserError: guidance on a condition, or a region to keep, without one; a strength below 1 without an image; an
            image that nothing reads, or that the codec cannot encode without random numbers.
        """
        names = {*self.conditions, *more}
        if options.condition_guidance != 1 and not names:
            raise UserError(
                f"condition_guidance is {options.condition_guidance}, but no condition is given; give one, "
                "or leave it 1"
            )
        masked = [one.name for one in model.conditions if one.condition.masks]
        if options.keep and not names.intersection(masked):
            known = f"give {' or '.join(masked)}" if masked else "this run has none"
            raise UserError(f"keep needs a condition with a mask, which says what is kept; {known}")
        if self.image is not None and options.strength == 1 and not options.keep:
            raise UserError("an image to start from is given, but strength is 1, all noise; set it below 1")
        check_start(options, self.image is not None)
        if self.image is not None and not callable(getattr(model.codec, "mean", None)):
            raise UserError(
                f"codec {type(model.codec).__name__} has no mean(params, moments), the latents of an image without "
                "random numbers, so no image can be started from"
            )


def check_start(options: SamplingOptions, has_image: bool) -> None:
    """Raises UserError for a strength below 1 without an image to start from."""
    if options.strength < 1 and not has_image:
        raise UserError(
            f"strength is {options.strength}, but no image is given to start from; give one, or leave it 1"
        )


def split_stored(
    model: Model, conditions: Mapping[str, Any], count: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Conditions as (those of a prepared set, checked; the others).

    Those of a prepared set are bfloat16 [count, h, w, moments + masks], as batches hold them.

    Raises:
      UserError: one of them that the model does not read, or of another shape.
    """
    masks = {one.name: one.condition.masks for one in model.conditions}
    stored = {name: one for name, one in conditions.items() if getattr(one, "dtype", None) == jnp.bfloat16}
    for name, array in stored.items():
        check_name(name, model)
        height, width, depth = model.codec.moments_shape(model.image_size)
        right = (count, height, width, depth + masks[name])
        if array.shape != right:
            raise UserError(
                f"condition {name!r} of a prepared set is bfloat16 {list(array.shape)}; it must be {list(right)}"
            )
    return stored, {name: one for name, one in conditions.items() if name not in stored}


def check_name(name: str, model: Model) -> None:
    """Makes sure that a model reads a condition.

    Raises:
      UserError: it does not.
    """
    known = [one.name for one in model.conditions]
    if name not in known:
        hint = nearest(str(name), known) if known else "it reads none; train with config.conditioning.names"
        raise UserError(f"the run reads no condition {name!r}; {hint}")


def _check(array: Any, size: int, masks: int, count: int | None, where: str) -> np.ndarray:
    array = np.asarray(array)
    if count is None or array.ndim != 4:
        return contract.check_image(array, size, masks, where)
    if len(array) != count:
        raise UserError(
            f"{where} has {len(array)} rows for {count} prompts; give one for each, or one for all"
        )
    for row in array:
        contract.check_image(row, size, masks, where)
    return array


def _rows(array: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    if array.ndim == 4:
        return array[np.asarray(numbers, int)]
    return np.broadcast_to(array, (len(numbers), *array.shape))


def _digest(array: np.ndarray) -> str:
    head = f"{array.shape}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
