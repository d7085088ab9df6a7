"""Samples as a folder of PNG files with a manifest; a request that was interrupted is resumed."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.monitor.grid import captioned_grid, read_png, write_png
from scaling_dit.sampling.pipeline import Pipeline
from scaling_dit.sampling.sampler import Sampler

MANIFEST = "manifest.jsonl"
GRID = "grid.png"
# Images in the grid of a request, at most.
_GRID_MOST = 64


def sample_to_folder(
    sampler: Sampler,
    pipe: Pipeline,
    items: Sequence[tuple[str, str]],
    out: epath.Path,
    *,
    seed: int,
    about: dict[str, Any],
) -> np.ndarray:
    """Images of (id, prompt) items as PNG files with a manifest and a captioned grid; finished ones are kept.

    Writes `ID.png`, `manifest.jsonl` (one line an image: id, prompt, seed, number, path and `about`) and `grid.png`.

    Args:
      about: what the images are made with, such as step and guidance; part of each manifest line.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      UserError: `out` holds images of another request, or an id occurs twice.
    """
    rows = [
        {"id": id_, "prompt": prompt, "seed": seed, "number": i, "path": f"{id_}.png", **about}
        for i, (id_, prompt) in enumerate(items)
    ]
    if len({row["id"] for row in rows}) < len(rows):
        raise UserError("two prompts have the same id; ids name the image files and must differ")
    if any(row["path"] == GRID for row in rows):
        raise UserError(
            f"a prompt has the id {GRID.removesuffix('.png')!r}, the name of the overview page; give another id"
        )
    out.mkdir(parents=True, exist_ok=True)
    done = _read_finished(out, rows)
    images: list[np.ndarray | None] = [
        read_png(out / row["path"]) if i in done else None for i, row in enumerate(rows)
    ]
    todo = [i for i, image in enumerate(images) if image is None]
    writes = jax.process_index() == 0
    for start in range(0, len(todo), sampler.options.batch):
        chunk = todo[start : start + sampler.options.batch]
        made = sampler(pipe.params, pipe.frozen, [rows[i]["prompt"] for i in chunk], seed=seed, numbers=chunk)
        for i, image in zip(chunk, made, strict=True):
            images[i] = image
            if writes:
                write_png(out / rows[i]["path"], image)
        if writes:
            # Listed only once written: a line of the manifest promises that the file is whole.
            finished = [row for row, image in zip(rows, images, strict=True) if image is not None]
            (out / MANIFEST).write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finished)
            )
    whole = np.stack([image for image in images if image is not None])
    if writes:
        shown = whole[:_GRID_MOST]
        write_png(out / GRID, captioned_grid(shown, [prompt for _, prompt in items[:_GRID_MOST]]))
    return whole


def _read_finished(out: epath.Path, rows: list[dict[str, Any]]) -> set[int]:
    """Numbers of the images that the folder's manifest lists."""
    manifest = out / MANIFEST
    if not manifest.exists():
        return set()
    finished = set()
    for line in manifest.read_text().split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            # A line cut off by a kill: that image is made again.
            continue
        number = row.get("number", -1)
        if not 0 <= number < len(rows) or row != rows[number]:
            wanted = rows[number] if 0 <= number < len(rows) else {}
            differs = [name for name in row if row[name] != wanted.get(name)]
            raise UserError(
                f"{out} holds images of another request ({', '.join(differs)} differ at id {row.get('id')!r}); "
                "give another --out, or delete that folder"
            )
        if (out / row["path"]).exists():
            finished.add(number)
    return finished
