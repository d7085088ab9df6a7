"""Conditions of a prepared set: made of each image once, or in several variants, and encoded with it.

Training on pixels makes a new mask for each step; a prepared set can hold only some. `variants` masks of each image are
encoded, by random numbers from (seed, key, condition, number) alone, and training takes one of them at random. Equal
ones are kept once, so edges, which nothing about is random, cost one. Each costs one more pass of the codec and as many
bytes as the image.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from scaling_dit.data.conditions import contract
from scaling_dit.data.conditions.contract import Condition
from scaling_dit.errors import UserError


class Making(NamedTuple):
    """What conditions a set gets.

    Attributes:
      conditions: name -> what makes it.
      variants: of each, at most.
      seed: of their random numbers.
    """

    conditions: Mapping[str, Condition] = {}
    variants: int = 1
    seed: int = 0


def make(
    making: Making, key: str, pixels: np.ndarray, given: Mapping[str, np.ndarray]
) -> dict[str, list[np.ndarray]]:
    """The different variants of each condition of an image: name -> uint8 [H, W, 3 + M] each, at least one.

    Args:
      key: of the image.
      pixels: uint8 [H, W, 3], square.
      given: conditions that stand beside it, which are used as they are.

    Raises:
      UserError: as `contract.make`.
    """
    record = {"image": pixels, "captions": (), "key": key, "conditions": given}
    found: dict[str, list[np.ndarray]] = {}
    for name, condition in making.conditions.items():
        kept: dict[bytes, np.ndarray] = {}
        for number in range(making.variants):
            digest = hashlib.blake2b(f"{making.seed}/{name}/{number}/{key}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            made = contract.make(condition, name, record, generator, len(pixels))
            kept.setdefault(made.tobytes(), made)
        found[name] = list(kept.values())
    return found


def encode(
    made: Sequence[Mapping[str, Sequence[np.ndarray]]],
    moments: Callable[[list[np.ndarray]], Any],
    batch: int,
) -> list[dict[str, np.ndarray]]:
    """The moments of the conditions of several images with their masks: bfloat16 [K, h, w, Mo + M] for each name.

    Args:
      made: what `make` gave for each image.
      moments: at most `batch` images uint8 [H, W, 3] -> their moments [batch, h, w, Mo].
    """
    flat = [one for row in made for variants in row.values() for one in variants]
    encoded = iter(_encoded(flat, moments, batch))
    return [
        {name: np.stack([next(encoded) for _ in variants]) for name, variants in row.items()} for row in made
    ]


def _encoded(
    flat: Sequence[np.ndarray], moments: Callable[[list[np.ndarray]], Any], batch: int
) -> Iterator[np.ndarray]:
    for start in range(0, len(flat), batch):
        some = flat[start : start + batch]
        found = np.asarray(moments([np.ascontiguousarray(one[..., :3]) for one in some]))
        for one, rows in zip(some, found, strict=False):
            masks = reduced(one[..., 3:], rows.shape[:2]).astype(ml_dtypes.bfloat16)
            yield np.concatenate([rows, masks], axis=-1)


def reduced(masks: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Masks uint8 [H, W, M] -> the share of each cell of a grid [h, w] that they cover: float32 [h, w, M] in [0, 1].

    Raises:
      UserError: H and W are no multiples of h and w.
    """
    (height, width, count), (h, w) = masks.shape, size
    if height % h or width % w:
        raise UserError(
            f"masks of {width}x{height} pixels cannot be divided into {w}x{h} latents; choose a "
            "config.source.image_size that the codec's factor divides"
        )
    cells = masks.reshape(h, height // h, w, width // w, count).astype(np.float32)
    return np.asarray(cells.mean((1, 3)) / 255, np.float32)


def about(
    making: Making,
    fields: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, str],
    own_code: Mapping[str, str],
) -> dict[str, Any]:
    """What a set says of its conditions: section -> its name, masks, variants, seed and own fields.

    Args:
      making: of the set.
      fields: section -> what its class is made with.
      classes: section -> the name that the config has for it, of a user's own "package.module:Class".
      own_code: such a name -> sha256 of its source file, which the set has too.
    """
    return {
        name: {
            "name": classes[name],
            **({"sha256": own_code[classes[name]]} if classes[name] in own_code else {}),
            "masks": condition.masks,
            "variants": making.variants,
            "seed": making.seed,
            "fields": {key: list(v) if isinstance(v, tuple) else v for key, v in fields[name].items()},
        }
        for name, condition in making.conditions.items()
    }


def check_square(names: Iterable[str], sizes: Sequence[Any]) -> None:
    """Makes sure that a set with conditions has square images alone.

    Raises:
      UserError: it has buckets.
    """
    if list(names) and len(sizes) > 1:
        raise UserError(
            "prepare --buckets makes no conditions, whose images are square; leave out --buckets, or "
            "config.conditioning.names"
        )
