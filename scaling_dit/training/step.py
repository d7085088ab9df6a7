"""One update of a run as a pure function: noise, forward pass, loss, gradients, optimizer, averages."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from scaling_dit.checkpoints.state import TrainState
from scaling_dit.diffusion import objectives, time_sampling, weightings
from scaling_dit.model.adapters import BASE, Adapters
from scaling_dit.model.model import Model
from scaling_dit.training import optim
from scaling_dit.trees import Params

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
# The stream, of the key of a step, for what is drawn for conditions; the keys that it is split into are its first.
_CONDITIONS = 2**16


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    value_and_grad: Callable[[Any], Any] | None = None,
    adapters: Adapters | None = None,
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]:
    """The pure function (state, frozen, batch) -> (state, metrics) of one update.

    `batch` is the global batch: images uint8 [B, H, W, 3], or from a prepared set their moments, latents bfloat16
    [B, h, w, M]; and of the captions ids int32 [B, L] and mask bool [B, L]. Of a run with image conditions it holds
    `conditions` too, by name as `Model.encode_conditions` takes them. It may hold the run's `seed`, uint32 [], so
    that runs that differ in it share one program; without it the config's is a constant of the program. Latents,
    timesteps, noise and what is dropped are drawn for all B rows at once and then split into `optim.accumulate`
    microbatches, so the split changes nothing.

    Args:
      model: of the run.
      optimizer: from `optim.make_optimizer`.
      config: of the run, resolved.
      value_and_grad: maps a loss function to a function (params, rows) -> (loss, gradients), as parallel/fsdp.py does;
        `jax.value_and_grad` by default.
      adapters: those that the state's parameters are, of a run that trains them beside `frozen["base"]`.
    """
    diffusion = config.diffusion
    learning_rate = optim.learning_rate_schedule(config.optim, config.steps)
    weighting = weightings.create_weighting(diffusion.weighting, diffusion.weighting_fields)
    sampling = time_sampling.create_time_sampling(
        diffusion.time_sampling, diffusion.time_sampling_fields, model.schedule
    )

    def loss_fn(params: Params, rows: Any, frozen: Params) -> jax.Array:
        if adapters is not None:
            params = adapters.add(frozen[BASE], params)
        noisy = objectives.add_noise(model.schedule, rows["latents"], rows["noise"], rows["timesteps"])
        if "text" in rows:
            text, text_mask = rows["text"]
        else:
            text, text_mask, _ = model.encode_text(params, frozen, rows["ids"], rows["mask"])
        times = rows["timesteps"].astype(jnp.float32)
        output = model.predict(
            params, noisy, times, text, text_mask, rows.get("conditions"), train=True, rng=rows["rngs"][0]
        )
        losses = objectives.diffusion_loss(
            output, rows["latents"], rows["noise"], rows["timesteps"], model.schedule,
            prediction=model.prediction, weighting=weighting, gamma=diffusion.min_snr_gamma,
        )  # fmt: skip
        return losses.mean()

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        seed = batch.get("seed", config.seed)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rows = draw_rows(model, config, frozen, batch, key, sampling)
        if value_and_grad is None:
            grad_fn = jax.value_and_grad(functools.partial(loss_fn, frozen=frozen))
        else:
            if not model.train_text_encoder:
                # Outside of the loss, for the encoder's weights may be split as well.
                rows["text"] = model.encode_text(state.params, frozen, rows["ids"], rows["mask"])[:2]
            grad_fn = value_and_grad(functools.partial(loss_fn, frozen={}))
        loss, grads = accumulate(grad_fn, state.params, rows, config.optim.accumulate)
        # A plan attributes time by this name.
        with jax.named_scope("optimizer"):
            new_state = optim.apply_gradients(
                state, loss, grads, optimizer, config.optim.ema, config.optim.ema_power
            )
        in_a_row, total = optim.nonfinite_count(new_state.opt_state)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(new_state.params),
            "learning_rate": learning_rate(state.step),
            "skipped_in_a_row": in_a_row,
            "skipped_total": total,
        }
        return new_state, metrics

    return train_step


def draw_rows(
    model: Model,
    config: ConfigDict,
    frozen: Params,
    batch: Batch,
    key: jax.Array,
    sampling: str | time_sampling.TimeSampling,
) -> dict[str, Any]:
    """The rows of one update, [B, ...] each: latents, noise, timesteps, captions after drop, and keys for the model.

    A run with image conditions has "conditions" too, as `draw_conditions` gives them.
    """
    diffusion = config.diffusion
    encode_key, time_key, noise_key, drop_key, model_key = jax.random.split(key, 5)
    empty_ids, empty_mask = model.text_encoder.tokenize([""])
    latents = model.batch_latents(frozen, batch, encode_key)
    ids, mask = objectives.drop_captions(
        drop_key,
        batch["ids"],
        batch["mask"],
        jnp.asarray(empty_ids[0]),
        jnp.asarray(empty_mask[0]),
        diffusion.caption_drop,
    )
    conditions = {}
    if model.conditions:
        conditions = {
            "conditions": draw_conditions(model, frozen, batch, jax.random.fold_in(key, _CONDITIONS))
        }
    return conditions | {
        "latents": latents,
        "ids": ids,
        "mask": mask,
        "noise": jax.random.normal(noise_key, latents.shape),
        # A microbatch uses the first of its rows.
        "rngs": jax.random.split(model_key, config.batch),
        "timesteps": time_sampling.sample_timesteps(
            time_key,
            config.batch,
            sampling,
            model.schedule,
            location=diffusion.time_location,
            scale=diffusion.time_scale,
        ),
    }


def draw_conditions(
    model: Model, frozen: Params, batch: Batch, key: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The image conditions of one update as a backbone takes them: name -> (image [B, h, w, Ci], present bool [B]).

    Each is dropped from its share of the rows on its own, by a stream of its name, so none depends on the others.
    """
    images = model.encode_conditions(frozen, batch["conditions"])
    found = {}
    for one in model.conditions:
        stream = jax.random.fold_in(key, zlib.crc32(one.name.encode()))
        dropped = jax.random.bernoulli(stream, one.drop, images[one.name].shape[:1])
        found[one.name] = images[one.name], ~dropped
    return found


def accumulate(
    grad_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    params: Params,
    rows: Any,
    microbatches: int,
) -> tuple[jax.Array, Params]:
    """Mean loss and gradients of `grad_fn(params, rows)` over microbatches; microbatch j of n holds rows j::n.

    They are strided because a device holds neighbouring rows: so each microbatch has as many rows of every device.
    """
    if microbatches == 1:
        return grad_fn(params, rows)
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), rows)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad_fn(params, part)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda x: x / microbatches, total)
