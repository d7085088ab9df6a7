"""Sampling: prompts to pictures, sharded over the mesh and resumable.

One `Sampler` serves the pictures shown during training, the `sample` verb and evaluation. Picture i of a request
depends on (seed, i, its prompt) alone, up to rounding: not on the batch, the mesh, or where an interrupted request was
taken up again.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.model import model as pipeline
from scaling_dit.diffusion import guidance as guidance_lib
from scaling_dit.diffusion import samplers
from scaling_dit.errors import UserError
from scaling_dit.monitor.grid import captioned_grid, read_png, write_png
from scaling_dit.parallel import rules, xla_flags

MANIFEST = "manifest.jsonl"
GRID = "grid.png"
_GRID_MOST = 64  # pictures in the grid of a request


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Prompts to pictures for one model on one mesh; compiled once for a batch size."""

    model: pipeline.Model
    mesh: jax.sharding.Mesh
    sampler: str
    steps: int
    guidance: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    batch: int  # pictures at once; rounded up to what the mesh divides

    @classmethod
    def of(
        cls, model: pipeline.Model, mesh: jax.sharding.Mesh, settings: ConfigDict, **changes: Any
    ) -> "Sampler":
        """From `config.sample`; `changes` that are not None replace fields.

        Raises:
          UserError: no such sampler, or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("model", "mesh")]
        fields = {name: settings[name] for name in names}
        fields |= {name: value for name, value in changes.items() if value is not None}
        samplers.find_sampler(fields["sampler"])
        for name, value in fields.items():
            config_lib.check_range(f"sample.{name}", value)
        return cls(model, mesh, **fields)

    @property
    def about(self) -> dict[str, Any]:
        """The settings that change pictures; those of guidance's variants only where they are in use."""
        about: dict[str, Any] = {"sampler": self.sampler, "steps": self.steps, "guidance": self.guidance}
        if self.guidance_rescale:
            about["guidance_rescale"] = self.guidance_rescale
        if tuple(self.guidance_interval) != guidance_lib.EVERYWHERE:
            about["guidance_interval"] = list(self.guidance_interval)  # as JSON reads it back
        return about

    def __call__(
        self,
        params: pipeline.Params,
        frozen: pipeline.Params,
        prompts: Sequence[str],
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] of N prompts, on every process.

        `numbers` [N] are the prompts' places in a larger request (0..N-1 by default); noise depends on (seed, number).
        """
        numbers = list(range(len(prompts)) if numbers is None else numbers)
        batch = rules.round_batch(self.mesh, min(self.batch, max(1, len(prompts))))
        pictures = []
        for start in range(0, len(prompts), batch):
            chunk = list(prompts[start : start + batch])
            places = numbers[start : start + batch]
            missing = batch - len(chunk)  # a short last batch is filled up: one shape, one compilation
            ids, mask = self.model.text_encoder.tokenize(chunk + [""] * missing)
            host = {"ids": ids, "mask": mask, "numbers": np.asarray(places + [0] * missing, np.int32)}
            held = rules.local_positions(self.mesh, batch)
            inputs = rules.to_global({name: rows[held] for name, rows in host.items()}, self.mesh, batch)
            with rules.activate(self.mesh):
                images = self._run(params, frozen, inputs, jnp.asarray(seed, jnp.uint32))
            pictures.append(np.asarray(multihost_utils.process_allgather(images, tiled=True))[: len(chunk)])
        return (
            np.concatenate(pictures)
            if pictures
            else np.zeros((0, *([self.model.image_size] * 2), 3), np.uint8)
        )

    def lower(self, params: pipeline.Params, frozen: pipeline.Params) -> Any:
        """The program of one batch, lowered for the mesh's devices, which need not be there: a `jax.stages.Lowered`.

        `params` and `frozen` are abstract, with shardings.
        """
        batch = rules.round_batch(self.mesh, self.batch)
        sharding, length = rules.batch_sharding(self.mesh), self.model.text_encoder.length
        inputs = {
            "ids": jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding),
            "mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_, sharding=sharding),
            "numbers": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding),
        }
        with rules.activate(self.mesh):
            return self._run.lower(params, frozen, inputs, jax.ShapeDtypeStruct((), jnp.uint32))

    @functools.cached_property
    def _run(self) -> Any:
        sharding = rules.batch_sharding(self.mesh)
        options = xla_flags.options(list(self.mesh.devices.flat)) or None
        return jax.jit(self._images, out_shardings=sharding, compiler_options=options)

    def _images(
        self, params: pipeline.Params, frozen: pipeline.Params, inputs: dict[str, jax.Array], seed: jax.Array
    ) -> jax.Array:
        model = self.model
        noise = model.noise(jax.random.key(seed), inputs["numbers"])
        empty_ids, empty_mask = model.text_encoder.tokenize([""])

        def condition(ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            tokens, shown, _ = model.encode_text(params, frozen, ids, mask)
            return {"text": tokens} if shown is None else {"text": tokens, "text_mask": shown}

        def predict(latents: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
            return model.predict(params, latents, timesteps, condition["text"], condition.get("text_mask"))

        guided = guidance_lib.guided(
            predict,
            self.guidance,
            condition(inputs["ids"], inputs["mask"]),
            condition(jnp.asarray(empty_ids), jnp.asarray(empty_mask)),
            rescale=self.guidance_rescale,
            interval=self.guidance_interval,
        )
        latents = samplers.sample(
            guided,
            noise,
            model.schedule,
            sampler=self.sampler,
            steps=self.steps,
            prediction=model.prediction,
            clip=model.codec.bounded,
        )
        return model.decode(frozen, latents)


def sample_to_folder(
    sampler: Sampler,
    pipe: "pipeline.Pipeline",
    items: Sequence[tuple[str, str]],
    out: epath.Path,
    *,
    seed: int,
    about: dict[str, Any],
) -> np.ndarray:
    """Pictures of (id, prompt) items as PNG files with a manifest and a captioned grid; finished ones are not redone.

    Writes `ID.png`, `manifest.jsonl` (one line a picture: id, prompt, seed, number, path and `about`) and `grid.png`.

    Args:
      about: what the pictures were made with, such as step and guidance; part of each manifest line.

    Returns:
      uint8 [N, H, W, 3].

    Raises:
      UserError: `out` holds pictures of another request, or an id occurs twice.
    """
    rows = [
        {"id": id_, "prompt": prompt, "seed": seed, "number": i, "path": f"{id_}.png", **about}
        for i, (id_, prompt) in enumerate(items)
    ]
    if len({row["id"] for row in rows}) < len(rows):
        raise UserError("two prompts have the same id; ids name the picture files and must differ")
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
    for start in range(0, len(todo), sampler.batch):
        chunk = todo[start : start + sampler.batch]
        made = sampler(pipe.params, pipe.frozen, [rows[i]["prompt"] for i in chunk], seed=seed, numbers=chunk)
        for i, image in zip(chunk, made, strict=True):
            images[i] = image
            if writes:
                write_png(out / rows[i]["path"], image)
        if writes:  # listed only once written: a line of the manifest is a promise that the file is whole
            finished = [row for row, image in zip(rows, images, strict=True) if image is not None]
            (out / MANIFEST).write_text(
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finished)
            )
    pictures = np.stack([image for image in images if image is not None])
    if writes:
        shown = pictures[:_GRID_MOST]
        write_png(out / GRID, captioned_grid(shown, [prompt for _, prompt in items[:_GRID_MOST]]))
    return pictures


def _read_finished(out: epath.Path, rows: list[dict[str, Any]]) -> set[int]:
    """Numbers of the pictures that the folder's manifest lists."""
    manifest = out / MANIFEST
    if not manifest.exists():
        return set()
    finished = set()
    for line in manifest.read_text().split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut off by a kill: that picture is made again
        number = row.get("number", -1)
        if not 0 <= number < len(rows) or row != rows[number]:
            wanted = rows[number] if 0 <= number < len(rows) else {}
            differs = [name for name in row if row[name] != wanted.get(name)]
            raise UserError(
                f"{out} holds pictures of another request ({', '.join(differs)} differ at id {row.get('id')!r}); "
                "give another --out, or delete that folder"
            )
        if (out / row["path"]).exists():
            finished.add(number)
    return finished


def open_for_sampling(
    workdir: str, *, step: int | None, ema: str | None, **changes: Any
) -> tuple["pipeline.Pipeline", Sampler, dict[str, Any]]:
    """A run with its sampler for the verbs that sample, and what to note in manifests.

    `ema` None takes the run's own choice, `config.sample.ema`; "none" the raw weights. `changes` replace fields
    of `config.sample` where they are not None.
    """
    config = pipeline.read_config(workdir)
    decay = pipeline.ema_name(config, config.sample.ema if ema is None else ema)
    pipe = pipeline.load(workdir, step=step, ema=decay)
    sampler = Sampler.of(pipe.model, pipe.mesh, config.sample, **changes)
    return pipe, sampler, {"step": pipe.step, "ema": decay or "none", **sampler.about}


def tag(about: dict[str, Any], seed: int) -> str:
    """A folder name for pictures made with these settings."""
    how = f"{about['sampler']}{about['steps']}-guidance{about['guidance']}"
    if "guidance_rescale" in about:
        how += f"-rescale{about['guidance_rescale']}"
    if "guidance_interval" in about:
        how += "-interval{}-{}".format(*about["guidance_interval"])
    return f"step{about['step']}-ema{about['ema']}-{how}-seed{seed}"


def main(
    workdir: str,
    prompts: Sequence[tuple[str, str]],
    out: str | None = None,
    *,
    num: int = 1,
    seed: int = 0,
    step: int | None = None,
    ema: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_rescale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    batch: int | None = None,
) -> int:
    """The `sample` verb: pictures, grid and manifest of (id, prompt) pairs; returns the exit code.

    Without `out` they go to a folder of this request under `samples/` in the workdir: the same request again adds what
    is missing there, another one gets its own.
    """
    pipe, chosen, about = open_for_sampling(
        workdir, step=step, ema=ema, sampler=sampler, steps=steps, guidance=guidance,
        guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, batch=batch,
    )  # fmt: skip
    items = [(id_ if num == 1 else f"{id_}-{k}", prompt) for id_, prompt in prompts for k in range(num)]
    asked = hashlib.sha256(json.dumps(items).encode()).hexdigest()[:8]
    folder = epath.Path(out) if out else epath.Path(workdir) / "samples" / f"{tag(about, seed)}-{asked}"
    sample_to_folder(chosen, pipe, items, folder, seed=seed, about=about)
    settings = ", ".join(f"{name} {value}" for name, value in about.items())
    print(f"{len(items)} pictures in {folder} ({settings}); all on one page: {folder / GRID}")
    return 0
