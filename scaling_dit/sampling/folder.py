"""A request's images in a folder, with a manifest: made by any number of processes, resumed after a kill, read back.

The images are cut into units: batches of the compiled program, or shards of several. Process i of n makes the units i,
i + n, ... An image depends on the request and on the compiled batch alone, in every bit, not on who made it or when.
Nothing but the manifest's rows is held in memory.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit import files
from scaling_dit.errors import UserError
from scaling_dit.files import parse_json
from scaling_dit.monitor.grid import captioned_grid, read_png, write_png
from scaling_dit.parallel import processes, rules
from scaling_dit.sampling.pipeline import Pipeline
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.sampling.shards import PNG, SHARD, STORES, read_shard, shard_name, write_shard

MANIFEST = "manifest.jsonl"
GRID = "grid.png"
# Images in the grid of a request, at most.
_GRID_MOST = 64
Make = Callable[[list[int]], np.ndarray]
Inputs = Callable[[Sequence[int]], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """The images of a request in a folder.

    Attributes:
      out: the folder.
      rows: the manifest's rows: id, prompt, seed, number, path, and what the images are made with.
      store: "png" for a file of each image, or "tar" or "array_record" for shards.
    """

    out: epath.Path
    rows: Sequence[Mapping[str, Any]]
    store: str = PNG

    @classmethod
    def of(
        cls,
        items: Sequence[tuple[str, str]],
        out: epath.Path,
        *,
        seed: int,
        about: Mapping[str, Any],
        store: str = "",
    ) -> "Images":
        """The request for these (id, prompt) items.

        Args:
          about: what the images are made with, such as step and guidance; part of each row.
          store: "" is "png" in a local folder and "tar" in a remote one, where files cost too much to have many.

        Raises:
          UserError: an id occurs twice, or no such store.
        """
        store = store or ("tar" if files.is_remote(out) else PNG)
        if store not in STORES:
            raise UserError(f"--store={store}: it must be one of {', '.join(STORES)}")
        rows = [
            {"id": id_, "prompt": prompt, "seed": seed, "number": i, "path": _path(id_, i, store), **about}
            for i, (id_, prompt) in enumerate(items)
        ]
        if len({row["id"] for row in rows}) < len(rows):
            raise UserError("two prompts have the same id; ids name the image files and must differ")
        if any(row["path"] == GRID for row in rows):
            raise UserError(
                f"a prompt has the id {GRID.removesuffix('.png')!r}, the name of the overview page; give another id"
            )
        return cls(out, rows, store)

    def make(
        self,
        sampler: Sampler,
        pipe: Pipeline,
        seed: int,
        share: tuple[int, int] | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """Makes the images of this process that are missing.

        Args:
          inputs: numbers -> arguments of the sampler beside the prompts: conditions and images.
          share: (i, n) for units i, i + n, ...; by default the units of this process of jax's.

        Raises:
          UserError: the folder holds images of another request.
        """
        index, count = share or (jax.process_index(), jax.process_count())
        self.out.mkdir(parents=True, exist_ok=True)
        done = self._finished()
        batch = rules.round_batch(pipe.mesh, min(sampler.options.batch, len(self.rows)))

        def make(numbers: list[int]) -> np.ndarray:
            prompts = [self.rows[i]["prompt"] for i in numbers]
            given = inputs(numbers) if inputs else {}
            return sampler(
                pipe.params, pipe.frozen, prompts, seed=seed, numbers=numbers, batch=batch, **given
            )

        if self.store == PNG:
            self._make_files(make, sampler.options.batch, done, index, count)
        else:
            self._make_shards(make, sampler.options.batch, index, count)

    def finish(self) -> None:
        """Writes the manifest of all images, in order, and the grid; called once all of them are made."""
        text = "".join(_line(row) for row in self.rows)
        files.write_whole(self.out / MANIFEST, text.encode())
        for path in self.out.glob(f"*.{MANIFEST}"):
            path.unlink()
        if not self.rows:
            return
        shown = list(self.read(range(min(_GRID_MOST, len(self.rows))), _GRID_MOST))
        captions = [row["prompt"] for row in self.rows[:_GRID_MOST]]
        write_png(self.out / GRID, captioned_grid(np.concatenate(shown), captions))

    def read(self, numbers: range, batch: int) -> Iterator[np.ndarray]:
        """Consecutive images in order, up to `batch` at a time: uint8 [some, H, W, 3].

        Raises:
          UserError: a file is missing or damaged.
        """
        stream = self._read_files(numbers) if self.store == PNG else self._read_shards(numbers)
        held: list[np.ndarray] = []
        for image in stream:
            held.append(image)
            if len(held) == batch:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)

    def _make_files(self, make: Make, batch: int, done: set[int], index: int, count: int) -> None:
        manifest = self.out / (f"{index}.{MANIFEST}" if count > 1 else MANIFEST)
        kept = [self.rows[i] for i in sorted(done) if (i // batch) % count == index]
        lines = _Lines(manifest, kept)
        for unit, start in enumerate(range(0, len(self.rows), batch)):
            if unit % count != index:
                continue
            todo = [i for i in range(start, min(start + batch, len(self.rows))) if i not in done]
            if not todo:
                continue
            for i, image in zip(todo, make(todo), strict=True):
                write_png(self.out / self.rows[i]["path"], image)
            # Listed only once written: a line of the manifest is a promise that the file is whole.
            lines.add([self.rows[i] for i in todo])

    def _make_shards(self, make: Make, batch: int, index: int, count: int) -> None:
        for unit, start in enumerate(range(0, len(self.rows), SHARD)):
            path = self.out / shard_name(unit, self.store)
            if unit % count != index or path.exists():
                continue
            numbers = list(range(start, min(start + SHARD, len(self.rows))))
            made = (image for i in range(0, len(numbers), batch) for image in make(numbers[i : i + batch]))
            write_shard(path, [self.rows[i] for i in numbers], made)

    def _finished(self) -> set[int]:
        """Numbers of the images that the folder's manifests list, and that are there.

        Raises:
          UserError: they list images of another request.
        """
        finished = set()
        for manifest in (self.out / MANIFEST, *self.out.glob(f"*.{MANIFEST}")):
            if not manifest.exists():
                continue
            for line in manifest.read_bytes().split(b"\n"):
                try:
                    row = parse_json(line)
                except json.JSONDecodeError:
                    # A line cut off by a kill: that image is made again.
                    continue
                self._check_row(row)
                if self.store != PNG or (self.out / row["path"]).exists():
                    finished.add(row["number"])
        if self.store != PNG:
            self._check_shards()
        return finished

    def _check_row(self, row: Mapping[str, Any]) -> None:
        number = row.get("number", -1)
        wanted = self.rows[number] if 0 <= number < len(self.rows) else {}
        if row != wanted:
            differs = [name for name in row if row[name] != wanted.get(name)]
            raise UserError(
                f"{self.out} holds images of another request ({', '.join(differs)} differ at id {row.get('id')!r}); "
                "give another --out, or delete that folder"
            )

    def _check_shards(self) -> None:
        """Shards say themselves which images they hold; the first row of each is enough."""
        for path in sorted(self.out.glob(f"images-*.{self.store}")):
            self._check_row(next(read_shard(path))[0])

    def _read_files(self, numbers: range) -> Iterator[np.ndarray]:
        for number in numbers:
            path = self.out / self.rows[number]["path"]
            try:
                yield read_png(path)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror or error}; delete it, and sample again") from None

    def _read_shards(self, numbers: range) -> Iterator[np.ndarray]:
        for unit in range(numbers.start // SHARD, -(-numbers.stop // SHARD)):
            start = unit * SHARD
            places = range(max(0, numbers.start - start), min(SHARD, numbers.stop - start))
            for row, image in read_shard(self.out / shard_name(unit, self.store), places):
                self._check_row(row)
                yield image


class _Lines:
    """A manifest that grows; a remote one is rewritten, because objects cannot be appended to."""

    def __init__(self, path: epath.Path, kept: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._lines = path, [_line(row) for row in kept]
        if path.exists() or kept:
            # Without lines that a kill cut off.
            files.write_whole(path, "".join(self._lines).encode())

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        added = [_line(row) for row in rows]
        if files.is_remote(self._path):
            self._lines += added
            self._path.write_text("".join(self._lines))
            return
        with self._path.open("a") as file:
            file.write("".join(added))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), ensure_ascii=False) + "\n"


def _path(id_: str, number: int, store: str) -> str:
    """Where an image lies in the folder; of one in a shard, the shard's name and the id."""
    return f"{id_}.png" if store == PNG else f"{shard_name(number // SHARD, store)}/{id_}.png"


def sample_to_folder(
    sampler: Sampler,
    pipe: Pipeline,
    items: Sequence[tuple[str, str]],
    out: epath.Path,
    *,
    seed: int,
    about: Mapping[str, Any],
    store: str = "",
    inputs: Inputs | None = None,
) -> Images:
    """Images of (id, prompt) items with a manifest and a captioned grid; those that are there are kept.

    `inputs` as in `Images.make`; `about` has to say what they are.

    Raises:
      UserError: `out` holds images of another request, an id occurs twice, or no such store.
    """
    images = Images.of(items, out, seed=seed, about=about, store=store)
    images.make(sampler, pipe, seed, inputs=inputs)
    # Waits for the others.
    processes.gather_bytes(b"")
    if jax.process_index() == 0:
        images.finish()
    processes.gather_bytes(b"")
    return images
