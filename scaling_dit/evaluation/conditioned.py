"""Image conditions of the items of a metric: checked, hashed, and given to the sampler batch by batch."""

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from scaling_dit.config.named import section_of
from scaling_dit.data import images as images_lib
from scaling_dit.data.conditions.inpaint import GREY
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import Item
from scaling_dit.parallel import rules
from scaling_dit.sampling.given import Given
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.trees import Params


@contextlib.contextmanager
def own_fields(metric: str, condition: str) -> Iterator[None]:
    """Mistakes in fields that a metric has as a condition has them are reported as the metric's, which they are."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"conditions.{condition}", f"metrics.{metric}")) from None


def stack(items: Sequence[Item], size: int) -> dict[str, np.ndarray]:
    """The conditions of some items at the size of a run's images: name -> uint8 [N, size, size, 3 + M]; {} for none.

    Raises:
      UserError: items with different conditions.
    """
    names = set(items[0].conditions) if items else set()
    for item in items:
        if set(item.conditions) != names:
            raise UserError(
                f"item {item.id!r} has the conditions {_listed(item.conditions)}, {items[0].id!r} has "
                f"{_listed(names)}; all items of a metric have the same"
            )
    return {name: np.stack([fitted(item.conditions[name], size) for item in items]) for name in sorted(names)}


def fitted(condition: np.ndarray, size: int) -> np.ndarray:
    """A condition uint8 [H, W, 3 + M] scaled to cover [size, size], the centre cut out, masks 0 or 255.

    A pixel that a mask touches at all is masked, and grey, so that no given pixel has anything of a masked one.
    """
    if condition.shape[:2] == (size, size):
        return condition
    image = images_lib.fit(Image.fromarray(condition[..., :3]), size, size)
    masks = np.moveaxis(condition[..., 3:] > 127, -1, 0)
    hidden = [images_lib.fit_mask(mask, size, size) for mask in masks]
    if hidden:
        image = np.where(np.any(hidden, axis=0)[..., None], np.uint8(GREY), image)
    channels = [np.where(mask, np.uint8(255), np.uint8(0))[..., None] for mask in hidden]
    return np.concatenate([image, *channels], axis=-1)


def digest(items: Sequence[Item]) -> str:
    """The sha256 of all conditions of some items; "" where they have none."""
    # All items have the same ones (`stack`); those of most metrics none, which would be read for nothing.
    if not items or not items[0].conditions:
        return ""
    held = hashlib.sha256()
    for item in items:
        for name, condition in sorted(item.conditions.items()):
            held.update(f"{item.id} {name} {condition.shape}\n".encode())
            held.update(np.ascontiguousarray(condition).tobytes())
    return held.hexdigest()


def check(items: Sequence[Item], conditions: Collection[str], metric: str) -> None:
    """Makes sure that a run reads the conditions of a metric's items.

    Args:
      conditions: of the run, as `config.conditioning.names` has them.

    Raises:
      UserError: it does not.
    """
    names = [section_of(name) for name in conditions]
    for name in items[0].conditions if items else ():
        if name not in names:
            reads = f"reads {_listed(names)}" if names else "reads none"
            raise UserError(
                f"metric {metric!r} gives condition {name!r}, and the run {reads}; train with it in "
                f"config.conditioning.names, or set config.metrics.{metric}.condition"
            )


def check_options(items: Sequence[Item], sampler: Sampler) -> None:
    """Makes sure that what a sampler is asked for acts on a metric's items: nothing is kept of an item without a mask.

    Raises:
      UserError: as `Given.check`.
    """
    Given().check(sampler.options, sampler.model, items[0].conditions if items else ())


def sampled(
    sampler: Sampler,
    params: Params,
    frozen: Params,
    items: Sequence[Item],
    prompts: Sequence[str],
    seed: int,
) -> Iterator[np.ndarray]:
    """The images of some items batch by batch, with their conditions: uint8 [some, H, W, 3].

    Args:
      prompts: to sample, one for each item.
    """
    if not items or not items[0].conditions:
        yield from sampler.batches(params, frozen, prompts, seed=seed)
        return
    batch = rules.round_batch(sampler.mesh, min(sampler.options.batch, len(items)))
    for start in range(0, len(items), batch):
        numbers = list(range(start, min(start + batch, len(items))))
        yield from sampler.batches(
            params, frozen, [prompts[i] for i in numbers], seed=seed, numbers=numbers, batch=batch,
            conditions=stack([items[i] for i in numbers], sampler.model.image_size),
        )  # fmt: skip


def _listed(names: Collection[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"
