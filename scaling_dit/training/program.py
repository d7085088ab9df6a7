"""The programs of a run on one mesh: what the trainer runs, and what `plan` compiles for machines not at hand."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_dit import backbones, trees
from scaling_dit.model.model import Model
from scaling_dit.parallel import fsdp, rules, xla_flags
from scaling_dit.parallel import mesh as mesh_lib
from scaling_dit.training import optim
from scaling_dit.training.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """The jitted train step of a run, with the shapes, dtypes and shardings of all that it takes."""

    mesh: Mesh
    init: Any  # jitted: key -> the state of step 0, in its shardings
    step: Any  # jitted `make_train_step`; the state given to it is donated
    state: Any  # abstract TrainState
    frozen: Any  # abstract frozen weights
    boxed_params: Any  # the parameters of the state with their logical axes, without shardings
    boxed_frozen: Any  # the same of the frozen weights
    batch: Mapping[str, jax.ShapeDtypeStruct]  # the global batch

    @classmethod
    def build(cls, config: ConfigDict, model: Model, mesh: Mesh) -> Self:
        """Builds the programs of a resolved config; nothing is allocated and nothing compiled.

        No operation runs on the mesh's devices, so they may be those of a topology description.
        """
        optimizer = optim.make_optimizer(config.optim, config.steps)
        init = functools.partial(init_state, model, optimizer, config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        boxed_params, boxed_frozen = jax.eval_shape(model.init, key)
        abstract = jax.eval_shape(init, key)
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
        step = jax.jit(
            make_train_step(model, optimizer, config, gathered),
            in_shardings=(shardings, frozen_shardings, rules.batch_sharding(mesh)),
            out_shardings=(shardings, None),
            donate_argnums=0,
            keep_unused=True,  # the state as a whole is what lies in memory, and what a plan tells
            compiler_options=xla_flags.options(list(mesh.devices.flat), config.sharding.sparse_core) or None,
        )
        return cls(
            mesh=mesh,
            init=jax.jit(init, out_shardings=shardings),
            step=step,
            state=rules.with_shardings(abstract, shardings),
            frozen=rules.with_shardings(trees.unbox(boxed_frozen), frozen_shardings),
            boxed_params=boxed_params,
            boxed_frozen=boxed_frozen,
            batch=batch_shapes(config, model, mesh),
        )

    def lower(self) -> Any:
        """The train step lowered for the mesh's devices, which need not be there: a `jax.stages.Lowered`."""
        with rules.activate(self.mesh):
            return self.step.lower(self.state, self.frozen, self.batch)


def run_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` as the run's backbone can use it, over all devices by default.

    Raises:
      UserError: sizes that do not fit the devices, `gather_once` on a mesh that cannot, or `sparse_core` without it or
        without SparseCores.
    """
    splits = backbones.splits_tokens(config.backbone.name)
    mesh = mesh_lib.make_mesh(**config.mesh, devices=devices, splits_tokens=splits)
    if config.sharding.gather_once:
        fsdp.check_mesh(mesh)
    if config.sharding.sparse_core:
        fsdp.check_sparse_core(mesh, config.sharding.gather_once)
    return mesh


def batch_shapes(config: ConfigDict, model: Model, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a train step: images uint8 [B, H, W, 3], ids int32 and mask bool [B, L].

    Of a prepared set the batch has `latents` in place of images, the moments bfloat16 [B, h, w, M].
    """
    batch, side, length = config.batch, model.image_size, model.text_encoder.length
    pictures: dict[str, tuple[tuple[int, ...], Any]] = {"images": ((batch, side, side, 3), jnp.uint8)}
    if config.source.name.startswith("latents:"):
        pictures = {"latents": ((batch, *model.codec.moments_shape(side)), jnp.bfloat16)}
    shapes = pictures | {
        "ids": ((batch, length), jnp.int32),
        "mask": ((batch, length), jnp.bool_),
    }
    sharding = rules.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()
    }
