"""A trained run opened to sample from it: `load(workdir)` and what it returns."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import trees
from scaling_dit.checkpoints import posthoc_ema
from scaling_dit.checkpoints.ema import find_ema, kept_emas, power_names
from scaling_dit.checkpoints.frozen_base import FrozenBase, check_base
from scaling_dit.checkpoints.store import Checkpoints, Damaged
from scaling_dit.checkpoints.workdir import (
    Workdir,
    check_tokenizer,
    load_tokenizer,
    read_config,
    tokenizer_hash,
)
from scaling_dit.components import describe
from scaling_dit.errors import UserError
from scaling_dit.model.adapters import Adapters
from scaling_dit.model.build import build_model
from scaling_dit.model.frozen import check_frozen, frozen_hash, open_frozen
from scaling_dit.model.model import Model, Parts
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling.given import Given
from scaling_dit.sampling.options import SamplingOptions
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
    # The average that `params` are; None for the raw weights.
    ema: str | None = None
    # Those that `params` hold, where the run trains adapters; None where it does not.
    adapters: Params | None = None
    _samplers: dict[SamplingOptions, Sampler] = dataclasses.field(default_factory=dict, repr=False)

    def encode_text(self, prompts: str | Sequence[str]) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Prompts, or one -> (tokens [B, L, D], mask [B, L] or None, pooled [B, P])."""
        ids, mask = self.model.text_encoder.tokenize(_prompts(prompts))
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
        """One call of the backbone: latents [B, h, w, c], timesteps [B] in [0, 1000) -> prediction [B, h, w, c].

        Raises:
          UserError: latents, timesteps or text that are no arrays of these shapes.
        """
        given = {"latents": (latents, 4), "timesteps": (timesteps, 1), "text": (text, 3)}
        for name, (value, rank) in given.items():
            shape = getattr(value, "shape", None)
            if shape is None or len(shape) != rank or shape[0] != latents.shape[0]:
                found = describe(value) if shape is None else f"of shape {shape}"
                raise UserError(
                    f"{name} is {found}; it must be an array of {rank} axes, the first that of the batch"
                )
        return self._predict(self.params, latents, timesteps, text, text_mask, conditions, extras)

    def sample(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        conditions: Mapping[str, np.ndarray] | None = None,
        image: np.ndarray | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3] of N prompts.

        Image i depends on (seed, i, prompt) alone, up to rounding, not on how prompts are batched.

        Args:
          prompts: any number of prompts; a string is one prompt.
          seed: of the initial noise, from 0 to 2**32 - 1.
          conditions: image conditions of the run, name -> uint8 [H, W, 3 + masks] for every prompt, or [N, ...] with
            one for each. One that is left out is absent.
          image: uint8 [H, W, 3] or [N, H, W, 3], to start from with a `strength` below 1.
          options: fields of `SamplingOptions`, such as `steps=20, guidance=4.0`; the run's `config.sample` has the
            others.

        Raises:
          UserError: a prompt that is no text, a seed out of range, options that `SamplingOptions.replace` refuses, or
            images that the run does not read, that have another size, or that the options lack.
        """
        texts = _prompts(prompts)
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed!r}; it must be an integer from 0 to 2**32 - 1")
        sampler = self.sampler(**options)
        given = Given.of(self.model, conditions, image, len(texts))
        given.check(sampler.options, self.model)
        return sampler(self.params, self.frozen, texts, seed=int(seed), **given.rows(range(len(texts))))

    def sampler(self, **options: Any) -> Sampler:
        """The sampler with the run's `config.sample` and, in its place, `options`; each is compiled once."""
        wanted = SamplingOptions.of(self.config.sample, **options)
        if wanted not in self._samplers:
            self._samplers[wanted] = Sampler(self.model, self.mesh, wanted)
        return self._samplers[wanted]

    @functools.cached_property
    def _encode_text(self) -> Any:
        return jax.jit(self.model.encode_text)

    @functools.cached_property
    def _predict(self) -> Any:
        return jax.jit(self.model.predict)


def load(
    workdir: str | epath.Path,
    step: int | None = None,
    ema: float | str | None = None,
    *,
    own_code: bool = False,
) -> Pipeline:
    """Opens a trained run.

    Args:
      workdir: folder that `train` wrote, local or gs://.
      step: checkpoint to read; the latest by default.
      ema: an EMA decay, or "power-0.08" for a power-function profile of that relative width: one that the run keeps,
        else, if it has `optim.ema_power`, rebuilt from snapshots (`posthoc_ema`). The raw weights by default (or 0).
      own_code: whether code outside of this package that the run's config names may run; see `workdir.read_config`.

    Raises:
      UserError: no run, one that names such code, no checkpoint, or an average that the run did not keep and that
        cannot be rebuilt.
    """
    return open_run(read_config(workdir, own_code=own_code), workdir, step, ema)


def open_run(
    config: ConfigDict, workdir: epath.PathLike, step: int | None = None, ema: float | str | None = None
) -> Pipeline:
    """As `load`, with the run's config, which the caller has read."""
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0):
        raise UserError(f"step is {step!r}; it must be the step of a checkpoint, an integer from 0 on")
    if ema is not None and (isinstance(ema, bool) or not isinstance(ema, int | float | str)):
        raise UserError(f"ema is {describe(ema)}; it must be a decay such as 0.999, or 'power-WIDTH'")
    run = Workdir(workdir)
    tokenizer = load_tokenizer(config, run)
    mesh = make_mesh(devices=jax.local_devices())
    model, samplers = _samplers_of(config, build_model(config, tokenizer), mesh)
    boxed, boxed_frozen = model.shapes()
    adapted = Adapters.of(config, boxed)
    trained = boxed if adapted is None else jax.eval_shape(adapted.init, jax.random.key(config.seed))
    target = rules.with_shardings(trees.unbox(trained), rules.param_shardings(mesh, trained))
    name, kept = find_ema(config, ema), kept_emas(config)
    rebuilt = name is not None and name not in kept
    with Checkpoints(run.checkpoints, read_only=True) as store:
        if name is not None and not rebuilt:
            target = _float32(target)
        params, saved, step = _read_params(store, step, target, None if rebuilt else name)
        if rebuilt:
            wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
            params = posthoc_ema.rebuild(run.ema_snapshots, store, step, wide, str(name), power_names(config))
    frozen = open_frozen(run.frozen, model, config.seed, mesh, boxed_frozen)
    now = frozen_hash(frozen, *model.encoders)
    check_frozen(now, saved, str(workdir))
    check_tokenizer(tokenizer_hash(run, tokenizer), saved, str(workdir))
    adapters = None
    if adapted is not None:
        weights, _, base = FrozenBase.read(run.base).load(mesh, boxed)
        check_base(base, saved, str(workdir))
        adapters, params = params, adapted.merge(weights, params)
    return Pipeline(
        config=config,
        model=model,
        params=params,
        frozen=frozen,
        mesh=mesh,
        step=step,
        ema=name,
        adapters=adapters,
        _samplers=samplers,
    )


def open_for_sampling(
    config: ConfigDict,
    workdir: str | epath.Path,
    changes: Mapping[str, Any],
    *,
    step: int | None = None,
    ema: float | str | None = None,
) -> tuple[Pipeline, Sampler, dict[str, Any]]:
    """A run with its sampler for the verbs that sample, and the settings that manifests and folder names note.

    Args:
      config: the run's.
      changes: options in place of those of `config.sample`.
      ema: as in `load`, but that None takes the run's own choice, `config.sample.ema`; "none" is the raw weights.

    Raises:
      UserError: as `load`, and for options that `SamplingOptions` refuses, before weights are read.
    """
    SamplingOptions.of(config.sample, **changes)
    pipe = open_run(config, workdir, step, config.sample.ema if ema is None else ema)
    sampler = pipe.sampler(**changes)
    return pipe, sampler, {"step": pipe.step, "ema": pipe.ema or "none", **sampler.options.about}


def _samplers_of(
    config: ConfigDict, model: Model, mesh: jax.sharding.Mesh
) -> tuple[Model, dict[SamplingOptions, Sampler]]:
    """The samplers, and the model that they have, of a pipeline that was opened before if this one's are the same.

    So checkpoints and averages of a run that are opened one after the other are sampled from by one compiled program.
    What a user brings by "package.module:Name" may have changed in between, so such a run has its own.
    """
    # Schedule and prediction, which cannot be compared, follow from the section.
    diffusion = repr(config.diffusion.to_dict())
    more = (model.image_size, model.train_text_encoder, model.text_mask, diffusion, mesh)
    parts = None if config_lib.own_names(config) else Parts.of(model, *more)
    return (model, {}) if parts is None else _shared(parts)


@functools.lru_cache(maxsize=4)
def _shared(parts: Parts) -> tuple[Model, dict[SamplingOptions, Sampler]]:
    return parts.model, {}


def _prompts(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list; a string is one prompt, not one a letter."""
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts is {describe(prompts)}; it must be a string or a list of strings")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"prompts[{number}] is {text!r}; a prompt is a string")
    return texts


def _float32(target: Any) -> Any:
    """`target` as averages are stored, in float32 whatever `backbone.param_dtype` is."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), target)


def _read_params(
    store: Checkpoints, step: int | None, target: Any, ema: str | None
) -> tuple[Params, dict[str, Any], int]:
    """(parameters, `extra`, step) of a checkpoint; of the newest one again if training removes it meanwhile."""
    while True:
        newest = store.latest_step() if step is None else step
        try:
            return *store.restore_params(newest, target, ema=ema), int(newest or 0)
        except UserError as error:
            if step is not None or newest is None or not store.is_gone(newest):
                if isinstance(error, Damaged):
                    raise Damaged(f"{error}; give an older --step, or let `train` set it aside") from error
                raise
