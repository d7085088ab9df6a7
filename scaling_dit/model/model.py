"""What one run is made of: codec, text encoder, backbone and noise schedule.

`Model` holds modules and pure functions, never weights. Training, sampling, evaluation and counting all use it, so the
trained model is the sampled one. Weights come in two trees: `params` (trained, in the train state) and `frozen` (the
rest).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from einops import reduce

from scaling_dit import components, encoders
from scaling_dit.backbones import contract
from scaling_dit.backbones.contract import Backbone
from scaling_dit.config.conditions import Chosen
from scaling_dit.diffusion import predictions, schedules
from scaling_dit.encoders.codec import Codec, init_codec
from scaling_dit.errors import UserError
from scaling_dit.trees import Params


@dataclasses.dataclass(frozen=True)
class Model:
    """The modules of a run and the pure functions over their weights."""

    codec: Codec
    text_encoder: encoders.TextEncoder
    backbone: Backbone
    schedule: schedules.Schedule
    # What the backbone predicts.
    prediction: predictions.Kind
    # Side of an image in pixels.
    image_size: int
    train_text_encoder: bool
    # Whether the backbone gets the mask that hides padding.
    text_mask: bool
    # Images that the backbone reads beside the text.
    conditions: tuple[Chosen, ...] = ()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one latent."""
        return self.codec.shape(self.image_size)

    @property
    def encoders(self) -> tuple[Codec, encoders.TextEncoder]:
        """Codec and text encoder, trained or not."""
        return self.codec, self.text_encoder

    def init(self, rng: jax.Array) -> tuple[Params, Params]:
        """Fresh weights as (params, frozen), each parameter boxed with its logical axes."""
        text_rng, backbone_rng = jax.random.split(rng)
        text_params = self.text_encoder.init(text_rng)
        latents = jnp.zeros((1, *self.latent_shape), jnp.float32)
        text = jnp.zeros((1, self.text_encoder.length, self.text_encoder.dim), jnp.float32)
        mask = jnp.ones(text.shape[:2], bool)
        variables = self.backbone.init(backbone_rng, latents, jnp.zeros((1,), jnp.float32), text, mask)
        if set(variables) != {"params"}:
            others = ", ".join(sorted(set(variables) - {"params"}))
            raise UserError(f"{type(self.backbone).__name__} keeps {others}; a run can train 'params' only")
        params: Params = {"backbone": variables["params"]}
        frozen: Params = {"codec": init_codec(self.codec, rng)}
        (params if self.train_text_encoder else frozen)["text_encoder"] = text_params
        return params, frozen

    def shapes(self) -> tuple[Params, Params]:
        """`init` as shapes and dtypes, boxed alike; nothing is allocated.

        Tracing a large backbone takes seconds, so a process does it once for models whose parts are equal, such as
        those of a run's checkpoints, opened one after the other.
        """
        parts = Parts.of(self, self.image_size, self.train_text_encoder)
        found = _trace(self) if parts is None else _traced(parts)
        # Other nodes than those that are kept, for a caller may change its own.
        copied: tuple[Params, Params] = jax.tree.map(lambda leaf: leaf, found)
        return copied

    def encode_text(
        self, params: Params, frozen: Params, ids: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """ids, mask [B, L] -> (tokens [B, L, D], mask [B, L] or None without `text_mask`, pooled [B, P])."""
        weights = params["text_encoder"] if self.train_text_encoder else frozen["text_encoder"]
        # A plan attributes time by these names.
        with jax.named_scope("text_encoder"):
            tokens, mask, pooled = self.text_encoder.apply(weights, ids, mask)
        return tokens, mask if self.text_mask else None, pooled

    def encode_image(self, frozen: Params, images: jax.Array, rng: jax.Array) -> jax.Array:
        """images uint8 [B, H, W, 3] -> latents float32 [B, h, w, c]."""
        with jax.named_scope("codec"):
            return self.codec.encode(frozen["codec"], images, rng)

    def batch_latents(self, frozen: Params, batch: Mapping[str, jax.Array], rng: jax.Array) -> jax.Array:
        """The latents float32 [B, h, w, c] of a batch: encoded `images`, or sampled from the moments in `latents`."""
        if "latents" in batch:
            return self.codec.sample(frozen["codec"], batch["latents"].astype(jnp.float32), rng)
        return self.encode_image(frozen, batch["images"], rng)

    def encode_conditions(self, frozen: Params, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Image conditions as the backbone reads them, float32 [B, h, w, C + masks], by name.

        The latents are the mean of their moments, so nothing is random. Masks are averaged over the pixels of a latent
        and lie in [0, 1].

        Args:
          frozen: weights that are not trained.
          given: by name uint8 [B, H, W, 3 + masks], or of a prepared set floating [B, h, w, moments + masks].
        """
        with jax.named_scope("codec"):
            return {name: self._encode_condition(frozen["codec"], image) for name, image in given.items()}

    def present_conditions(
        self, frozen: Params, given: Mapping[str, jax.Array]
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """`encode_conditions` as the backbone's call takes them, present in every row."""
        encoded = self.encode_conditions(frozen, given)
        return {name: (image, jnp.ones(image.shape[:1], bool)) for name, image in encoded.items()}

    def _encode_condition(self, params: Params, given: jax.Array) -> jax.Array:
        if jnp.issubdtype(given.dtype, jnp.floating):
            stored = self.codec.moments_shape(self.image_size)[-1]
            moments, masks = given[..., :stored].astype(jnp.float32), given[..., stored:].astype(jnp.float32)
        else:
            moments = self.codec.moments(params, given[..., :3])
            # Of any size: buckets have several.
            height, width = moments.shape[1:3]
            masks = given[..., 3:].astype(jnp.float32) / 255
            if masks.shape[-1]:
                masks = reduce(masks, "b (h p) (w q) m -> b h w m", "mean", h=height, w=width)
            else:
                # A codec of a user's own may have sides that do not divide, which masks alone need.
                masks = jnp.zeros((*moments.shape[:3], 0))
        return jnp.concatenate([self.codec.mean(params, moments), masks], axis=-1)

    def noise(self, key: jax.Array, numbers: jax.Array) -> jax.Array:
        """Normal noise float32 [N, h, w, c]; a row depends on `key` and its entry of `numbers` [N] alone."""
        keys = self.row_keys(key, numbers)
        return jax.vmap(lambda row_key: jax.random.normal(row_key, self.latent_shape))(keys)

    def row_keys(self, key: jax.Array, numbers: jax.Array) -> jax.Array:
        """One random key a row, [N]; each depends on `key` and its number of `numbers` [N] alone."""
        return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

    def predict(
        self,
        params: Params,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None = None,
        conditions: Mapping[str, Any] | None = None,
        extras: Mapping[str, Any] | None = None,
        *,
        train: bool = False,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """The backbone's call (backbones/contract.py) on the weights of a run, float32 out; `rng` is for its dropout.

        Raises:
          UserError: a backbone that returns another shape than the contract's.
        """
        prediction = self.backbone.apply(
            {"params": params["backbone"]},
            latents,
            timesteps,
            text,
            text_mask,
            conditions,
            extras,
            train=train,
            rngs=None if rng is None else {"dropout": rng},
        )
        contract.check_output(self.backbone, prediction, latents.shape)
        return prediction.astype(jnp.float32)

    def decode(self, frozen: Params, latents: jax.Array) -> jax.Array:
        """latents [B, h, w, c] -> images uint8 [B, H, W, 3]."""
        return self.codec.decode(frozen["codec"], latents)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a model that something follows from, to be made once for all models that have them.

    Attributes:
      made_of: the parts.
      model: one that has them.
    """

    made_of: tuple[Any, ...]
    model: Model = dataclasses.field(compare=False)

    @classmethod
    def of(cls, model: Model, *more: Any) -> Self | None:
        """Codec, text encoder, backbone, conditions, and more, which has a hash; None if one is a user's own."""
        parts = [*model.encoders, model.backbone, *model.conditions]
        # It may come from a file beside the weights, which may have changed.
        read = [getattr(part, "architecture", None) for part in model.encoders]
        # A backbone's text too, for True equals 1 but is refused where 1 is not.
        made_of = (type(model), *parts, repr(model.backbone), *read, *more)
        return cls(made_of, model) if components.comparable(*parts) else None


def _trace(model: Model) -> tuple[Params, Params]:
    shapes: tuple[Params, Params] = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    return shapes


@functools.lru_cache(maxsize=8)
def _traced(parts: Parts) -> tuple[Params, Params]:
    return _trace(parts.model)
