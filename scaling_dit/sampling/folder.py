"""Samples as a folder of PNG files with a manifest; a request that was interrupted is resumed."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.files import parse_json
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
) -> None:
    """Writes everything that `iterate` writes."""
    for _ in iterate(sampler, pipe, items, out, seed=seed, about=about):
        pass


def iterate(
    sampler: Sampler,
    pipe: Pipeline,
    items: Sequence[tuple[str, str]],
    out: epath.Path,
    *,
    seed: int,
    about: dict[str, Any],
) -> Iterator[np.ndarray]:
    """Images of (id, prompt) items as PNG files with a manifest and a captioned grid; finished ones are read back.

    Writes `ID.png`, `manifest.jsonl` (one line an image: id, prompt, seed, number, path and `about`) and, at the end,
    `grid.png`.

    Args:
      about: what the images were made with, such as step and guidance; part of each manifest line.

    Yields:
      uint8 [up to sampler.options.batch, H, W, 3], in the order of the items, once they are written.

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
    writes = jax.process_index() == 0
    shown: list[np.ndarray] = []
    for start in range(0, len(rows), sampler.options.batch):
        numbers = list(range(start, min(start + sampler.options.batch, len(rows))))
        images = {i: read_png(out / rows[i]["path"]) for i in numbers if i in done}
        todo = [i for i in numbers if i not in done]
        if todo:
            prompts = [rows[i]["prompt"] for i in todo]
            made = sampler(pipe.params, pipe.frozen, prompts, seed=seed, numbers=todo)
            images |= dict(zip(todo, made, strict=True))
        if todo and writes:
            for i in todo:
                write_png(out / rows[i]["path"], images[i])
            # Listed only once written: a line of the manifest is a promise that the file is whole.
            done |= set(todo)
            finished = [row for i, row in enumerate(rows) if i in done]
            (out / MANIFEST).write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finished)
            )
        batch = np.stack([images[i] for i in numbers])
        if start < _GRID_MOST:
            shown.append(batch[: _GRID_MOST - start])
        yield batch
    if writes and shown:
        captions = [prompt for _, prompt in items[:_GRID_MOST]]
        write_png(out / GRID, captioned_grid(np.concatenate(shown), captions))


def _read_finished(out: epath.Path, rows: list[dict[str, Any]]) -> set[int]:
    """Numbers of the images that the folder's manifest lists."""
    manifest = out / MANIFEST
    if not manifest.exists():
        return set()
    finished = set()
    for line in manifest.read_bytes().split(b"\n"):
        try:
            row = parse_json(line)
        except ValueError:
            # A line cut off by a kill: that image is made again.
            continue
        number = row.get("number", -1) if isinstance(row, dict) else None
        if not isinstance(number, int):
            raise UserError(
                f"{manifest} is damaged: a line is no image of this program; give another --out, or delete that folder"
            )
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
