"""Sampling: prompts to images, sharded over the mesh.

One `Sampler` serves evaluation in training, the verbs that sample and `Pipeline.sample`. Image i of a request depends
on (seed, i, its prompt) alone, up to rounding: not on the batch, the mesh, or where an interrupted request was resumed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from scaling_dit.diffusion import samplers
from scaling_dit.diffusion.guidance import Guidance, create_guidance, guided
from scaling_dit.model.model import Model
from scaling_dit.parallel import rules, xla_flags
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.trees import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """Prompts to images for one model on one mesh with fixed options; compiled once for a batch size."""

    model: Model
    mesh: jax.sharding.Mesh
    options: SamplingOptions

    def __post_init__(self) -> None:
        # Before the program is traced, because a user's own parts are checked on arrays.
        _ = self._parts

    def __call__(
        self,
        params: Params,
        frozen: Params,
        prompts: Sequence[str],
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of N prompts, on every process that the mesh has devices of.

        `numbers` [N] are the prompts' places in a larger request (0..N-1 by default); noise depends on (seed, number).
        `batch` are the images of the compiled program, by default the options' or, if there are fewer, N. With the same
        one an image has the same bits, whatever else is sampled with it.
        """
        batches = list(self.batches(params, frozen, prompts, seed, numbers, batch))
        if not batches:
            return np.zeros((0, self.model.image_size, self.model.image_size, 3), np.uint8)
        return np.concatenate(batches)

    def batches(
        self,
        params: Params,
        frozen: Params,
        prompts: Sequence[str],
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> Iterator[np.ndarray]:
        """The images of a call batch by batch, so that not all of them are in memory."""
        numbers = list(range(len(prompts)) if numbers is None else numbers)
        wanted = batch or min(self.options.batch, max(1, len(prompts)))
        batch = rules.round_batch(self.mesh, wanted)
        for start in range(0, len(prompts), batch):
            chunk = list(prompts[start : start + batch])
            places = numbers[start : start + batch]
            # A short last batch is filled up: one shape, one compilation.
            missing = batch - len(chunk)
            ids, mask = self.model.text_encoder.tokenize(chunk + [""] * missing)
            host = {"ids": ids, "mask": mask, "numbers": np.asarray(places + [0] * missing, np.int32)}
            held = rules.local_positions(self.mesh, batch)
            inputs = rules.to_global({name: rows[held] for name, rows in host.items()}, self.mesh, batch)
            with rules.activate(self.mesh):
                images = self._run(params, frozen, inputs, jnp.asarray(seed, jnp.uint32))
            # Images of this process alone: others sample other ones.
            if images.is_fully_addressable:
                yield np.asarray(images)[: len(chunk)]
            else:
                yield np.asarray(multihost_utils.process_allgather(images, tiled=True))[: len(chunk)]

    def lower(self, params: Params, frozen: Params) -> Any:
        """The program of one batch, lowered for the mesh's devices, attached or described: a `jax.stages.Lowered`.

        `params` and `frozen` are abstract, with shardings.
        """
        batch = rules.round_batch(self.mesh, self.options.batch)
        sharding, length = rules.batch_sharding(self.mesh), self.model.text_encoder.length
        inputs = {
            "ids": jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding),
            "mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_, sharding=sharding),
            "numbers": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding),
        }
        with rules.activate(self.mesh):
            return self._run.lower(params, frozen, inputs, jax.ShapeDtypeStruct((), jnp.uint32))

    @functools.cached_property
    def _parts(self) -> tuple[samplers.Sampler, Guidance]:
        """The sampler and the guidance that the options name.

        Raises:
          UserError: no such part, or a user's own that is none.
        """
        chosen = self.options
        sampler = samplers.create_sampler(
            chosen.sampler, dict(chosen.sampler_fields), self.model.schedule, chosen.steps
        )
        guidance = create_guidance(chosen.guidance_method, dict(chosen.guidance_method_fields))
        return sampler, guidance

    @functools.cached_property
    def _run(self) -> Any:
        sharding = rules.batch_sharding(self.mesh)
        options = xla_flags.options(list(self.mesh.devices.flat)) or None
        return jax.jit(self._images, out_shardings=sharding, compiler_options=options)

    def _images(
        self, params: Params, frozen: Params, inputs: dict[str, jax.Array], seed: jax.Array
    ) -> jax.Array:
        model, key = self.model, jax.random.key(seed)
        sampler, guidance = self._parts
        noise = model.noise(key, inputs["numbers"])
        empty_ids, empty_mask = model.text_encoder.tokenize([""])

        def condition(ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
            tokens, shown, _ = model.encode_text(params, frozen, ids, mask)
            return {"text": tokens} if shown is None else {"text": tokens, "text_mask": shown}

        def predict(latents: jax.Array, timesteps: jax.Array, condition: dict[str, jax.Array]) -> jax.Array:
            return model.predict(params, latents, timesteps, condition["text"], condition.get("text_mask"))

        denoise = guided(
            predict,
            self.options.guidance,
            condition(inputs["ids"], inputs["mask"]),
            condition(jnp.asarray(empty_ids), jnp.asarray(empty_mask)),
            method=guidance,
            rescale=self.options.guidance_rescale,
            interval=self.options.guidance_interval,
        )
        latents = samplers.sample(
            denoise,
            noise,
            model.schedule,
            sampler=sampler,
            steps=self.options.steps,
            prediction=model.prediction,
            clip=model.codec.bounded,
            keys=model.row_keys(jax.random.fold_in(key, 1), inputs["numbers"]),
        )
        return model.decode(frozen, latents)
