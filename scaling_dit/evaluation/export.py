"""The `sample` verb: images of given or published prompts, and the same in the layout of an official tool."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaling_dit.errors import UserError
from scaling_dit.evaluation import conditioned
from scaling_dit.evaluation.layouts import write_layout
from scaling_dit.evaluation.metric import Item
from scaling_dit.evaluation.prompt_sets import open_prompt_set
from scaling_dit.parallel import processes
from scaling_dit.sampling.folder import Images
from scaling_dit.sampling.prompts import gather_prompts
from scaling_dit.sampling.sample import OwnConditions, Sampling


def sample_prompts(
    workdir: str,
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    prompt_set: str | None = None,
    out: str | None = None,
    *,
    layout: str | None = None,
    **settings: Any,
) -> int:
    """Writes images, grid and manifest of prompts; returns the exit code.

    Args:
      prompts, prompts_file: as in `sampling.prompts.gather_prompts`.
      prompt_set: a published set in place of both.
      out: as in `Sampling`.
      layout: an official tool's, see `layouts`; written beside the images, to `layout-NAME`.
      settings: the other fields of `Sampling`.

    Raises:
      UserError: no prompts or prompts from two places, and as `Sampling.run` and `write_layout`.
    """
    items = _items(prompts, prompts_file, prompt_set)
    sampling = Sampling(workdir, out, **settings)
    own = None
    if items[0].conditions:
        if sampling.condition:
            raise UserError("--prompt_set has images and masks of its own; leave out --condition")

        def read(numbers: list[int], size: int) -> dict[str, np.ndarray]:
            return conditioned.stack([items[i] for i in numbers], size)

        own = OwnConditions(tuple(items[0].conditions), read, conditioned.digest(items))
    for images in sampling.run([(item.id, item.prompt) for item in items], own):
        if layout and jax.process_index() == 0:
            folder = images.out / f"layout-{layout}"
            write_layout(layout, _pairs(items, images, sampling.num), folder)
            print(f"for the official tool: {folder}")
        processes.gather_bytes(b"")
    return 0


def _items(prompts: Sequence[str], prompts_file: str | None, prompt_set: str | None) -> Sequence[Item]:
    if not prompt_set:
        return [Item(id_, text) for id_, text in gather_prompts(prompts, prompts_file)]
    if prompts or prompts_file:
        raise UserError("give prompts or --prompt_set, not both")
    found = open_prompt_set(prompt_set)
    if not found.complete and jax.process_index() == 0:
        published = found.about()["prompts_published"]
        print(f"{found.name}: {len(found.items)} prompts; {published} are published")
    return found.items


def _pairs(items: Sequence[Item], images: Images, num: int) -> Iterator[tuple[Item, np.ndarray]]:
    """Each item with its `num` images, one item in memory at a time."""
    stream = images.read(range(len(items) * num), num)
    return zip(items, stream, strict=True)
