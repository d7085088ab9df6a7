"""A trained run opened to sample from it: `load(workdir)` and what it returns."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import trees
from scaling_dit.checkpoints import posthoc_ema
from scaling_dit.checkpoints import store as checkpoints
from scaling_dit.checkpoints.ema import find_ema, kept_emas, power_name
from scaling_dit.checkpoints.workdir import CHECKPOINTS, load_tokenizer, read_config
from scaling_dit.errors import UserError
from scaling_dit.model import frozen as frozen_weights
from scaling_dit.model.build import build_model
from scaling_dit.model.model import Model
from scaling_dit.parallel import mesh as mesh_lib
from scaling_dit.parallel import rules
from scaling_dit.sampling.sampler import Sampler
from scaling_dit.trees import Params


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A model with its weights, on a mesh of all local devices."""

    config: ConfigDict
    model: Model
    params: Params
    frozen: Params
    mesh: jax.sharding.Mesh
    step: int
    _samplers: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def encode_text(self, prompts: Sequence[str]) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Prompts -> (tokens [B, L, D], mask [B, L] or None, pooled [B, P])."""
        ids, mask = self.model.text_encoder.tokenize(list(prompts))
        return self._encode_text(self.params, self.frozen, ids, mask)

    def predict(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_mask: jax.Array | None = None,
        conditions: Mapping[str, Any] | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> jax.Array:
        """One call of the backbone: latents [B, h, w, c], timesteps [B] in [0, 1000) -> prediction [B, h, w, c]."""
        return self._predict(self.params, latents, timesteps, text, text_mask, conditions, extras)

    def sample(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] of N prompts.

        Picture i depends on (seed, i, prompt) alone, up to rounding, not on how prompts are batched. `sampler`,
        `steps` and `guidance` default to the run's `config.sample`.
        """
        wanted = (sampler, steps, guidance)
        if wanted not in self._samplers:  # each is compiled once
            self._samplers[wanted] = Sampler.of(
                self.model, self.mesh, self.config.sample, sampler=sampler, steps=steps, guidance=guidance
            )
        return self._samplers[wanted](self.params, self.frozen, list(prompts), seed=seed)

    @functools.cached_property
    def _encode_text(self) -> Any:
        return jax.jit(self.model.encode_text)

    @functools.cached_property
    def _predict(self) -> Any:
        return jax.jit(self.model.predict)


def load(workdir: str | epath.Path, step: int | None = None, ema: float | str | None = None) -> Pipeline:
    """Opens a trained run.

    Args:
      workdir: folder that `train` wrote, local or gs://.
      step: checkpoint to read; the latest by default.
      ema: an EMA decay, or "power-0.08" for a power-function profile of that relative width: one that the run keeps,
        else, if it has `optim.ema_power`, rebuilt from snapshots (`posthoc_ema`). The raw weights by default (or 0).

    Raises:
      UserError: no run, no checkpoint, or an average that the run did not keep and that cannot be rebuilt.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    model = build_model(config, load_tokenizer(config, workdir))
    mesh = mesh_lib.make_mesh(devices=jax.local_devices())
    boxed, boxed_frozen = jax.eval_shape(model.init, jax.random.key(config.seed))
    target = rules.with_shardings(trees.unbox(boxed), rules.param_shardings(mesh, boxed))
    name, kept = find_ema(config, ema), kept_emas(config)
    rebuilt = name is not None and name not in kept
    with checkpoints.Checkpoints(workdir / CHECKPOINTS, read_only=True) as store:
        if name is not None and not rebuilt:
            target = _float32(target)
        params, saved, step = _read_params(store, step, target, None if rebuilt else name)
        if rebuilt:
            tracks = [power_name(width) for width in config.optim.ema_power]
            wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
            params = posthoc_ema.rebuild(workdir, store, step, wide, str(name), tracks)
    frozen = frozen_weights.open_frozen(workdir, model, config.seed, mesh, boxed_frozen)
    now = frozen_weights.frozen_hash(frozen, *model.encoders)
    frozen_weights.check_frozen(now, saved, str(workdir))
    return Pipeline(config=config, model=model, params=params, frozen=frozen, mesh=mesh, step=step)


def open_for_sampling(
    workdir: str, *, step: int | None, ema: str | None, **changes: Any
) -> tuple["Pipeline", Sampler, dict[str, Any]]:
    """A run with its sampler for the verbs that sample, and what to note in manifests.

    `ema` None takes the run's own choice, `config.sample.ema`; "none" the raw weights. `changes` replace fields
    of `config.sample` where they are not None.
    """
    config = read_config(workdir)
    decay = find_ema(config, config.sample.ema if ema is None else ema)
    pipe = load(workdir, step=step, ema=decay)
    sampler = Sampler.of(pipe.model, pipe.mesh, config.sample, **changes)
    return pipe, sampler, {"step": pipe.step, "ema": decay or "none", **sampler.about}


def _float32(target: Any) -> Any:
    """`target` as averages are stored, in float32 whatever `backbone.param_dtype` is."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), target)


def _read_params(
    store: checkpoints.Checkpoints, step: int | None, target: Any, ema: str | None
) -> tuple[Params, dict[str, Any], int]:
    """(parameters, `extra`, step) of a checkpoint; of the newest one again if training removes it meanwhile."""
    while True:
        newest = store.latest_step() if step is None else step
        try:
            return *store.restore_params(newest, target, ema=ema), int(newest or 0)
        except UserError:
            if step is not None or newest is None or not store.is_gone(newest):
                raise
