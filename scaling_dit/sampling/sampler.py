"""Sampling: prompts to images, sharded over the mesh.

One `Sampler` serves evaluation in training, the verbs that sample and `Pipeline.sample`. Image i of a request depends
on (seed, i, its prompt) alone, up to rounding: not on the batch, the mesh, or where an interrupted request was resumed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from scaling_dit.diffusion import samplers
from scaling_dit.diffusion.guidance import Guidance, create_guidance, guided
from scaling_dit.model.model import Model
from scaling_dit.parallel import rules, xla_flags
from scaling_dit.sampling.given import Given, check_start, split_stored
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
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        image: np.ndarray | None = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of N prompts, on every process that the mesh has devices of.

        `numbers` [N] are the prompts' places in a larger request (0..N-1 by default); noise depends on (seed, number).
        `batch` are the images of the compiled program, by default the options' or, if there are fewer, N. With the same
        one an image has the same bits, whatever else is sampled with it.

        `conditions` are image conditions of the model, name -> uint8 [N, H, W, 3 + masks], or as a prepared set holds
        them, bfloat16 [N, h, w, moments + masks]; those left out are absent.
        `image` uint8 [N, H, W, 3] is what a strength below 1 starts from.

        Raises:
          UserError: a condition that the model does not read or of another shape, or a strength without an image.
        """
        batches = list(
            self.batches(params, frozen, prompts, seed, numbers, batch, conditions=conditions, image=image)
        )
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
        *,
        conditions: Mapping[str, np.ndarray] | None = None,
        image: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:
        """The images of a call batch by batch, so that not all of them are in memory."""
        given = self._given(conditions, image, len(prompts))
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
            host |= jax.tree.map(functools.partial(_filled, start=start, batch=batch), given)
            local = jax.tree.map(lambda rows, held=held: rows[held], host)
            inputs = rules.to_global(local, self.mesh, batch)
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
        side = self.model.image_size
        inputs: dict[str, Any] = {
            "ids": jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharding),
            "mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_, sharding=sharding),
            "numbers": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding),
        }
        pixels = {
            one.name: jax.ShapeDtypeStruct(
                (batch, side, side, 3 + one.condition.masks), jnp.uint8, sharding=sharding
            )
            for one in self.model.conditions
        }
        if pixels:
            inputs["conditions"] = pixels
        if self.options.strength < 1:
            inputs["image"] = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8, sharding=sharding)
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
        samplers.check_strength(chosen.sampler, chosen.steps, chosen.strength)
        return sampler, guidance

    def _given(
        self, conditions: Mapping[str, np.ndarray] | None, image: np.ndarray | None, count: int
    ) -> dict[str, Any]:
        """Conditions and image as inputs of the program, checked; only those that there are."""
        found: dict[str, Any] = {}
        stored: dict[str, np.ndarray] = {}
        if isinstance(conditions, Mapping):
            stored, conditions = split_stored(self.model, conditions, count)
        checked = Given.of(self.model, conditions, image, count)
        if stored or checked.conditions:
            found["conditions"] = stored | checked.rows(range(count)).get("conditions", {})
        check_start(self.options, image is not None)
        if image is not None and (self.options.strength < 1 or self.options.keep):
            found["image"] = checked.rows(range(count))["image"]
        return found

    @functools.cached_property
    def _run(self) -> Any:
        sharding = rules.batch_sharding(self.mesh)
        options = xla_flags.options(list(self.mesh.devices.flat)) or None
        return jax.jit(self._images, out_shardings=sharding, compiler_options=options)

    def _images(self, params: Params, frozen: Params, inputs: dict[str, Any], seed: jax.Array) -> jax.Array:
        model, key = self.model, jax.random.key(seed)
        sampler, guidance = self._parts
        noise = model.noise(key, inputs["numbers"])
        empty_ids, empty_mask = model.text_encoder.tokenize([""])

        present = model.present_conditions(frozen, inputs.get("conditions", {}))
        absent = {name: (image, jnp.zeros_like(shown)) for name, (image, shown) in present.items()}

        def condition(ids: jax.Array, mask: jax.Array, images: dict[str, Any]) -> dict[str, Any]:
            tokens, shown, _ = model.encode_text(params, frozen, ids, mask)
            found = {"text": tokens} if shown is None else {"text": tokens, "text_mask": shown}
            return found | ({"conditions": images} if images else {})

        def predict(latents: jax.Array, timesteps: jax.Array, condition: dict[str, Any]) -> jax.Array:
            given = condition["text"], condition.get("text_mask"), condition.get("conditions")
            return model.predict(params, latents, timesteps, *given)

        empty = condition(jnp.asarray(empty_ids), jnp.asarray(empty_mask), present)
        denoise = guided(
            predict,
            self.options.guidance,
            condition(inputs["ids"], inputs["mask"], present),
            empty,
            method=guidance,
            rescale=self.options.guidance_rescale,
            interval=self.options.guidance_interval,
            bare=empty | {"conditions": absent} if present else None,
            bare_scale=self.options.condition_guidance,
        )
        image = None
        if "image" in inputs:
            image = model.encode_conditions(frozen, {"image": inputs["image"]})["image"]
        kept = kept_region(model, inputs.get("conditions", {})) if self.options.keep else None
        latents = samplers.sample(
            denoise,
            noise,
            model.schedule,
            sampler=sampler,
            steps=self.options.steps,
            prediction=model.prediction,
            clip=model.codec.bounded,
            keys=model.row_keys(jax.random.fold_in(key, 1), inputs["numbers"]),
            image=image,
            strength=self.options.strength,
            known=None if kept is None else known_latents(present[kept][0], image, model),
        )
        decoded = model.decode(frozen, latents)
        # Latents of a prepared set have no pixels to paste.
        if kept is None or inputs["conditions"][kept].dtype != jnp.uint8:
            return decoded
        given = inputs["conditions"][kept]
        return jnp.where(
            given[..., 3:].max(-1, keepdims=True) > 127, decoded, inputs.get("image", given[..., :3])
        )


def kept_region(model: Model, conditions: Mapping[str, jax.Array]) -> str | None:
    """The first condition with masks among those that are given; None without one."""
    masked = (one.name for one in model.conditions if one.condition.masks and one.name in conditions)
    return next(masked, None)


def known_latents(condition: jax.Array, image: jax.Array | None, model: Model) -> tuple[jax.Array, jax.Array]:
    """Clean latents, and where they hold: [B, h, w, C] and bool [B, h, w, 1].

    They hold where every pixel of a latent is given: where the average of every mask is 0.

    Args:
      condition: with its masks, as the backbone reads it, [B, h, w, C + masks].
      image: latents of the whole image, if it is given.
      model: of the run.
    """
    channels = model.codec.channels
    latents = condition[..., :channels] if image is None else image
    return latents, (condition[..., channels:] == 0).all(-1, keepdims=True)


def _filled(rows: np.ndarray, start: int, batch: int) -> np.ndarray:
    """The rows of a batch, those that the last batch lacks as copies of its first."""
    found = rows[start : start + batch]
    missing = batch - len(found)
    return np.concatenate([found, np.repeat(found[:1], missing, axis=0)]) if missing else found
