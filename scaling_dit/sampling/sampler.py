"""Sampling: prompts to pictures, sharded over the mesh and resumable.

One `Sampler` serves the pictures shown during training, the `sample` verb and evaluation. Picture i of a request
depends on (seed, i, its prompt) alone, up to rounding: not on the batch, the mesh, or where an interrupted request was
taken up again.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.diffusion import guidance as guidance_lib
from scaling_dit.diffusion import samplers
from scaling_dit.model.model import Model
from scaling_dit.parallel import rules, xla_flags
from scaling_dit.trees import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Prompts to pictures for one model on one mesh; compiled once for a batch size."""

    model: Model
    mesh: jax.sharding.Mesh
    sampler: str
    steps: int
    guidance: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    batch: int  # pictures at once; rounded up to what the mesh divides

    @classmethod
    def of(cls, model: Model, mesh: jax.sharding.Mesh, settings: ConfigDict, **changes: Any) -> "Sampler":
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
        params: Params,
        frozen: Params,
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

    def lower(self, params: Params, frozen: Params) -> Any:
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
        self, params: Params, frozen: Params, inputs: dict[str, jax.Array], seed: jax.Array
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
