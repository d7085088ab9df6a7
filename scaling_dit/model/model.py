"""What one run is made of: codec, text encoder, backbone and noise schedule.

`Model` holds modules and pure functions, never weights: trainer, generation, evaluation and counting all use it, so
what is trained is what is sampled. Weights come in two trees: `params` (trained, in the train state) and `frozen` (the
rest). `Pipeline` is a model with its weights, as `load(workdir)` returns it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import backbones, encoders, trees
from scaling_dit.model import frozen as frozen_weights
from scaling_dit.checkpoints import store as checkpoints, posthoc_ema, state
from scaling_dit import config as config_lib
from scaling_dit.backbones.contract import Backbone
from scaling_dit.data import sources
from scaling_dit.diffusion import objectives, schedules
from scaling_dit.encoders import codec as codecs
from scaling_dit.encoders import scratch
from scaling_dit.errors import UserError
from scaling_dit.parallel import mesh as mesh_lib
from scaling_dit.parallel import rules
from scaling_dit.checkpoints.state import POWER, power_name

Params = dict[str, Any]
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Model:
    """The modules of a run and the pure functions over their weights."""

    codec: codecs.Codec
    text_encoder: encoders.TextEncoder
    backbone: Backbone
    schedule: schedules.Schedule
    prediction: str  # what the backbone predicts: eps | x0 | v | flow
    image_size: int  # px
    train_text_encoder: bool
    text_mask: bool

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one latent."""
        return self.codec.shape(self.image_size)

    @property
    def encoders(self) -> tuple[codecs.Codec, encoders.TextEncoder]:
        """Codec and text encoder: what stands before the backbone, trained or not."""
        return self.codec, self.text_encoder

    def init(self, rng: jax.Array) -> tuple[Params, Params]:
        """Fresh weights as (params, frozen), with the logical axes of every parameter (boxed)."""
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
        frozen: Params = {"codec": codecs.init_codec(self.codec, rng)}
        (params if self.train_text_encoder else frozen)["text_encoder"] = text_params
        return params, frozen

    def encode_text(
        self, params: Params, frozen: Params, ids: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """ids, mask [B, L] -> (tokens [B, L, D], mask [B, L] or None when the run shows padding, pooled [B, P])."""
        weights = params["text_encoder"] if self.train_text_encoder else frozen["text_encoder"]
        with jax.named_scope("text_encoder"):  # a plan tells its time apart by this name
            tokens, mask, pooled = self.text_encoder.apply(weights, ids, mask)
        return tokens, mask if self.text_mask else None, pooled

    def encode_image(self, frozen: Params, images: jax.Array, rng: jax.Array) -> jax.Array:
        """images uint8 [B, H, W, 3] -> latents float32 [B, h, w, c]."""
        with jax.named_scope("codec"):
            return self.codec.encode(frozen["codec"], images, rng)

    def batch_latents(self, frozen: Params, batch: Mapping[str, jax.Array], rng: jax.Array) -> jax.Array:
        """The latents float32 [B, h, w, c] of a batch: of its `images`, or drawn from the moments in `latents`."""
        if "latents" in batch:
            return self.codec.sample(frozen["codec"], batch["latents"].astype(jnp.float32), rng)
        return self.encode_image(frozen, batch["images"], rng)

    def noise(self, key: jax.Array, numbers: jax.Array) -> jax.Array:
        """Normal noise float32 [N, h, w, c]; each row depends on `key` and its number of `numbers` [N] alone."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return jax.vmap(lambda row_key: jax.random.normal(row_key, self.latent_shape))(keys)

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
        *sides, channels = latents.shape
        right = (*sides, channels), (*sides, 2 * channels)
        if prediction.shape not in right:
            raise UserError(
                f"{type(self.backbone).__name__} returned {prediction.shape} for latents {latents.shape}; "
                f"it must return {right[0]}, or {right[1]} with learned sigma"
            )
        return prediction.astype(jnp.float32)

    def decode(self, frozen: Params, latents: jax.Array) -> jax.Array:
        """latents [B, h, w, c] -> images uint8 [B, H, W, 3]."""
        return self.codec.decode(frozen["codec"], latents)


def build(config: ConfigDict, tokenizer: Any, source: sources.Source | None = None) -> Model:
    """The model a complete config describes.

    Args:
      tokenizer: of `make_tokenizer`, or of `load_tokenizer` from the workdir.
      source: the run's, if it is open already. Without it a source that takes its `image_size` from the config is not
        opened, so that a trained run draws where its data are not.
    """
    text_encoder = encoders.create_text_encoder(tokenizer=tokenizer, **config.text_encoder.to_dict())
    codec = codecs.create_codec(**config.codec.to_dict())
    backbone = backbones.create_for(
        in_channels=codec.channels, text_dim=text_encoder.dim, **config.backbone.to_dict()
    )
    extras = getattr(backbone, "EXTRAS", {})
    if extras:
        raise UserError(
            f"backbone {config.backbone.name!r} needs the extras {', '.join(extras)}, which no source here supplies"
        )
    diffusion = config.diffusion
    schedule = schedules.make_schedule(
        diffusion.schedule, zero_snr=diffusion.zero_snr, time_shift=diffusion.time_shift
    )
    objectives.check_prediction(diffusion.prediction, schedule)
    return Model(
        codec=codec,
        text_encoder=text_encoder,
        backbone=backbone,
        schedule=schedule,
        prediction=diffusion.prediction,
        image_size=_image_size(config) if source is None else source.image_size,
        train_text_encoder=config.train_text_encoder,
        text_mask=config.text_mask,
    )


def _image_size(config: ConfigDict) -> int:
    if "image_size" in config.source:
        return config.source.image_size
    return create_source(config).image_size


def create_source(config: ConfigDict) -> sources.Source:
    """The training split of the run's data."""
    return sources.create_source(**config.source.to_dict())


def make_tokenizer(config: ConfigDict, source: sources.Source | None = None) -> Any:
    """The tokenizer of a new run: the one that its text encoder's fields name, or of the words of its captions.

    None where a text encoder brings its own and the fields do not say from where; sizes can be counted without it.

    Args:
      config: of the run.
      source: the run's, if it is open already; not opened where captions are not needed.

    Raises:
      UserError: no tokenizer where the fields say, or damaged files.
    """
    kind = encoders.tokenizer_type(config.text_encoder.name)
    if hasattr(kind, "read"):
        return kind.read(config.text_encoder)
    return scratch.build_tokenizer(create_source(config) if source is None else source)


def load_tokenizer(config: ConfigDict, workdir: epath.Path) -> Any:
    """The tokenizer that a run keeps in its workdir.

    Raises:
      UserError: missing or damaged file.
    """
    return encoders.tokenizer_type(config.text_encoder.name).load(workdir / TOKENIZER_FILE)


def abstract_params(config: ConfigDict) -> Params:
    """Shapes and dtypes of everything a config trains or holds frozen; nothing is allocated."""
    model = build(config, make_tokenizer(config))
    params, frozen = jax.eval_shape(model.init, jax.random.key(0))
    return trees.unbox({**params, **{name: tree for name, tree in frozen.items() if tree}})


def read_config(workdir: str | epath.Path) -> ConfigDict:
    """The config a run was started with; fields that came with a later version have their defaults.

    Raises:
      UserError: the folder holds no run, or one with fields this version does not know.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"no run in {workdir}: {CONFIG_FILE} is missing; --workdir must be a folder that `train` wrote"
        )
    return config_lib.resolve(config_lib.from_json(path.read_text()))


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
        from scaling_dit.sampling import sampler as generate  # generate builds on this module

        wanted = (sampler, steps, guidance)
        if wanted not in self._samplers:  # each is compiled once
            self._samplers[wanted] = generate.Sampler.of(
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
    model = build(config, load_tokenizer(config, workdir))
    mesh = mesh_lib.make_mesh(devices=jax.local_devices())
    boxed, boxed_frozen = jax.eval_shape(model.init, jax.random.key(config.seed))
    target = with_shardings(trees.unbox(boxed), rules.param_shardings(mesh, boxed))
    name, kept = ema_name(config, ema), kept_emas(config)
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


def kept_emas(config: ConfigDict) -> list[str]:
    """The keys of `state.emas`."""
    return [*map(state.ema_name, config.optim.ema), *map(power_name, config.optim.ema_power)]


def ema_name(config: ConfigDict, ema: float | str | None) -> str | None:
    """The name of an average that a run keeps or can rebuild: "0.999", "power-0.05"; None for the raw weights.

    Raises:
      UserError: no such average, or one that the run can neither read nor rebuild.
    """
    if ema is None or str(ema) == "none":
        return None
    kept, text = kept_emas(config), str(ema)
    try:
        number = float(text.removeprefix(POWER))
        if text.startswith(POWER):
            name, right = power_name(number), 0 < number < config_lib.WIDEST_EMA_POWER
        elif number == 0:
            return None
        else:
            name, right = repr(number), 0 < number < 1
    except ValueError:
        name, right = text, False
    if not right or (name not in kept and not config.optim.ema_power):
        also = "; with config.optim.ema_power it could rebuild others" if right else ""
        raise UserError(
            f"the run keeps no EMA of decay {ema}; it keeps {', '.join(kept) or 'none'} (0 = raw weights){also}"
        )
    return name


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `abstract` with the places of `shardings`: what a checkpoint is restored into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
