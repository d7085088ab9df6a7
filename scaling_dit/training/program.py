"""The jitted functions of a run on one mesh: `train` runs them, `plan` compiles them for unattached devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_dit import backbones, trees
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.state import TrainState, create_state, init_state, start_from
from scaling_dit.model.adapters import BASE, Adapters
from scaling_dit.model.model import Model
from scaling_dit.nn.attention import recorded_choices
from scaling_dit.parallel import fsdp, rules, xla_flags
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.training import mup, optim
from scaling_dit.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The jitted train step of a run, with the shapes, dtypes and shardings of everything it takes.

    Attributes:
      mesh: of the run.
      init: jitted `init_state`: key -> the state of step 0, in its shardings.
      step: jitted `make_train_step`: (state, frozen, batch) -> (state, metrics); the state is donated.
      state: abstract TrainState.
      frozen: abstract frozen weights.
      boxed_params: abstract parameters with their logical axes, without shardings; of adapters, where these are
        trained.
      boxed_frozen: the same of the frozen weights; under "base" those of the base, where adapters are trained.
      adapters: those that the run trains in place of its parameters, if it does.
      batch: abstract global batch.
    """

    mesh: Mesh
    init: Any
    step: Any
    state: Any
    frozen: Any
    boxed_params: Any
    boxed_frozen: Any
    batch: Mapping[str, Any]
    adapters: Adapters | None = None

    @classmethod
    def build(cls, config: ConfigDict, model: Model, mesh: Mesh) -> Self:
        """Builds the functions of a resolved config; nothing is allocated and nothing compiled.

        No operation runs on the mesh's devices, so a topology description may have made them.
        """
        optimizer, init = optimizer_and_init(config, model)
        key = jax.eval_shape(lambda: jax.random.key(0))
        boxed_params, boxed_frozen = model.shapes()
        adapters = Adapters.of(config, boxed_params, mesh)
        if adapters is not None:
            boxed_frozen = boxed_frozen | {BASE: boxed_params}
            boxed_params = jax.eval_shape(adapters.init, key)

        # Traced once, for its shapes and for what is compiled.
        @functools.partial(jax.jit, inline=True)
        def fresh_state(key: jax.Array) -> TrainState:
            return init(key)

        abstract = jax.eval_shape(fresh_state, key)
        shardings = rules.state_shardings(mesh, abstract, rules.param_shardings(mesh, boxed_params))
        frozen_shardings = rules.param_shardings(mesh, boxed_frozen)
        gathered = None
        if config.sharding.gather_once:
            gathered = functools.partial(
                fsdp.value_and_grad,
                mesh=mesh,
                shardings=shardings.params,
                sparse_core=config.sharding.sparse_core,
            )
        batch = batch_shapes(config, model, mesh)
        step = jax.jit(
            make_train_step(model, optimizer, config, gathered, adapters),
            in_shardings=(shardings, frozen_shardings, jax.tree.map(lambda one: one.sharding, batch)),
            out_shardings=(shardings, None),
            donate_argnums=0,
            # The whole state lies in memory, and a plan reports it whole.
            keep_unused=True,
            compiler_options=xla_flags.options(list(mesh.devices.flat), config.sharding.sparse_core) or None,
        )
        return cls(
            mesh=mesh,
            init=jax.jit(fresh_state, out_shardings=shardings),
            step=step,
            state=rules.with_shardings(abstract, shardings),
            frozen=rules.with_shardings(trees.unbox(boxed_frozen), frozen_shardings),
            boxed_params=boxed_params,
            boxed_frozen=boxed_frozen,
            batch=batch,
            adapters=adapters,
        )

    @functools.cached_property
    def decisions(self) -> dict[str, str]:
        """The decisions for this mesh: how each attention runs, and which parameters no device splits.

        The step is traced for it, once: its first call reuses the trace.
        """
        with rules.activate(self.mesh), recorded_choices() as chosen:
            self.step.trace(self.state, self.frozen, self.batch)
        decided = {"attention": "; ".join(sorted(map(str, chosen)))}
        # On other meshes every parameter is whole on each device, as the config asks.
        if self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1:
            decided["replicated"] = str(rules.replicated(self.mesh, self.boxed_params))
        return decided

    def lower(self) -> Any:
        """The train step lowered for the mesh's devices, attached or not: a `jax.stages.Lowered`."""
        with rules.activate(self.mesh):
            return self.step.lower(self.state, self.frozen, self.batch)


# Sections of a config that a run reads beside its jitted functions.
BESIDE = (
    "captions",
    "checkpoint",
    "compile_cache",
    "eval",
    "loader",
    "log",
    "metrics",
    "processes",
    "rewind",
    "sample",
)
# How many programs of this process's runs are held at most; each holds what was compiled for it.
KEPT = 1
# The programs of this process's last runs and what they were built from, the last one first.
_last: list[tuple[Any, StepProgram]] = []


def shared(config: ConfigDict, model: Model, mesh: Mesh) -> StepProgram:
    """`StepProgram.build`, or the program of one of the process's last runs if this one's would be the same.

    Runs that differ in nothing that the step reads are traced and compiled once, one after another in a process. What
    a user brings by "package.module:Name" may have changed in between, so such a run always builds its own. `KEPT`
    programs are held until others take their place.
    """
    fields = {
        name: value
        for name, value in config_lib.flatten(config).items()
        if name.partition(".")[0] not in BESIDE
    }
    # An input of the step, and of what makes the first state.
    del fields["seed"]
    if config.optim.decay == "constant":
        del fields["steps"]
    # A source reaches the program by shapes and words alone, which are the model's.
    if any(name.partition(".")[0] not in (*BESIDE, "source") for name in config_lib.own_names(config)):
        return StepProgram.build(config, model, mesh)
    key = repr(fields), repr(model), mesh
    found = next((program for built_from, program in _last if built_from == key), None)
    program = found or StepProgram.build(config, model, mesh)
    others = [entry for entry in _last if entry[1] is not program]
    _last[:] = [(key, program), *others][:KEPT]
    return program


def optimizer_and_init(
    config: ConfigDict, model: Model
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[jax.Array], TrainState]]:
    """The optimizer of a run, and key -> its state of step 0; with `optim.mup_base` both follow muP (mup.py)."""
    width = config.optim.mup_base
    if config.adapter.rank:
        optimizer = optim.make_optimizer(config.optim, config.steps)
        return optimizer, functools.partial(init_adapters, model, optimizer, config)
    if not width:
        optimizer = optim.make_optimizer(config.optim, config.steps)
        return optimizer, functools.partial(init_state, model, optimizer, config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    base = functools.partial(mup.base_params, model, width)
    shapes = trees.unbox(model.shapes()[0])
    far = jax.eval_shape(functools.partial(mup.base_params, model, mup.FAR * width), key)
    optimizer = optim.make_optimizer(
        config.optim, config.steps, mup.fan_ins(shapes, jax.eval_shape(base, key), far)
    )

    def init(key: jax.Array) -> TrainState:
        state = init_state(model, optimizer, config, key)
        return start_from(state, mup.initial(state.params, base(key), far))

    return optimizer, init


def init_adapters(
    model: Model, optimizer: optax.GradientTransformation, config: ConfigDict, key: jax.Array
) -> TrainState:
    """The state of step 0 of a run that trains adapters: they are its parameters; pure."""
    adapters = Adapters.of(config, model.shapes()[0])
    assert adapters is not None
    fresh = trees.unbox(adapters.init(key))
    return create_state(fresh, optimizer, config.optim.ema, config.optim.ema_power)


def run_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`, over all devices by default, as the run's backbone can use it.

    Raises:
      UserError: sizes that do not fit the devices, `gather_once` on a mesh that cannot, or `sparse_core` without it or
        without SparseCores.
    """
    splits = backbones.splits_tokens(config.backbone.name)
    mesh = make_mesh(**config.mesh, devices=devices, splits_tokens=splits)
    if config.sharding.gather_once:
        fsdp.check_mesh(mesh)
    if config.sharding.sparse_core:
        fsdp.check_sparse_core(mesh, config.sharding.gather_once)
    return mesh


def batch_shapes(config: ConfigDict, model: Model, mesh: Mesh) -> dict[str, Any]:
    """The global batch of a train step, as `make_train_step` describes it: `jax.ShapeDtypeStruct`s."""
    batch, side, length = config.batch, model.image_size, model.text_encoder.length
    sharding = rules.batch_sharding(mesh)

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=sharding)

    masks = {one.name: one.condition.masks for one in model.conditions}
    batched: dict[str, Any] = {"ids": rows(jnp.int32, length), "mask": rows(jnp.bool_, length)}
    if config.source.name.startswith("latents:"):
        height, width, stored = model.codec.moments_shape(side)
        batched["latents"] = rows(jnp.bfloat16, height, width, stored)
        conditions = {n: rows(jnp.bfloat16, height, width, stored + count) for n, count in masks.items()}
    else:
        batched["images"] = rows(jnp.uint8, side, side, 3)
        conditions = {n: rows(jnp.uint8, side, side, 3 + count) for n, count in masks.items()}
    if conditions:
        batched["conditions"] = conditions
    return batched | {"seed": jax.ShapeDtypeStruct((), jnp.uint32, sharding=rules.whole(mesh))}


def place_seed(seed: int, mesh: Mesh) -> jax.Array:
    """The run's seed as the step takes it, uint32 [], whole on every device; no process waits for another."""
    value = np.uint32(seed)
    return jax.make_array_from_callback((), rules.whole(mesh), lambda index: value)
