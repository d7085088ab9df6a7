"""What a start of a run builds before its first step, and the folder it is kept in."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.state import TrainState, start_from
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import check_kept, claim_workdir, open_workdir
from scaling_dit.data.captions import CaptionPolicy
from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources import Source
from scaling_dit.evaluation.in_training import InTraining
from scaling_dit.model import codec_identity as identity
from scaling_dit.model import frozen as frozen_weights
from scaling_dit.model.build import build_model, open_source
from scaling_dit.model.model import Model
from scaling_dit.nn.attention import recorded_choices
from scaling_dit.parallel import rules
from scaling_dit.training import rewind
from scaling_dit.training.program import StepProgram, batch_shapes, run_mesh
from scaling_dit.training.rewind import Rewind, SpikeDetector
from scaling_dit.trees import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """A run ready to begin: everything but the state."""

    config: ConfigDict  # resolved
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    source: Source
    model: Model
    positions: np.ndarray  # of the global batch, which this process reads
    init: Callable[[jax.Array], TrainState]  # key -> the state of step 0, in its shardings
    target: TrainState  # shapes, dtypes and shardings of the state
    boxed_params: Params  # its parameters with their logical axes
    frozen: Params
    frozen_hash: str
    step_fn: Any  # the jitted `make_train_step`; the state given to it is donated
    looks: InTraining

    @classmethod
    def open(
        cls, config: ConfigDict, workdir: epath.Path, devices: Sequence[jax.Device] | None = None
    ) -> Self:
        """Builds a run and makes the workdir its own, last of all: a start that fails here leaves no trace.

        Raises:
          UserError: a mistake in the config or the data, or a workdir of another experiment.
        """
        config = config_lib.resolve(config)
        mesh = run_mesh(config, devices)
        positions = rules.local_positions(mesh, config.batch)
        rules.local_positions(
            mesh, config.batch // config.optim.accumulate
        )  # a microbatch must split as well
        source = open_source(config)
        tokenizer = open_workdir(workdir, config, source)
        model = build_model(config, tokenizer, source)

        # Shapes first, then straight into their shardings.
        program = StepProgram.build(config, model, mesh)
        frozen = frozen_weights.open_frozen(workdir, model, config.seed, mesh, program.boxed_frozen)
        identity.check_source(source, config, model.codec, frozen["codec"])
        looks = InTraining(model, source, mesh, config)
        frozen_hash = frozen_weights.frozen_hash(frozen, *model.encoders)
        check_kept(workdir, frozen_hash)
        frozen_weights.save_frozen(workdir, model, frozen)
        claim_workdir(workdir, config, tokenizer)
        return cls(
            config=config,
            workdir=workdir,
            mesh=mesh,
            source=source,
            model=model,
            positions=positions,
            init=program.init,
            target=program.state,
            boxed_params=program.boxed_params,
            frozen=frozen,
            frozen_hash=frozen_hash,
            step_fn=program.step,
            looks=looks,
        )

    def decisions(self) -> dict[str, str]:
        """What was decided for this mesh: what each attention runs as, and what of the parameters nothing splits.

        The step is traced for it, once: its first call takes over the trace.
        """
        with rules.activate(self.mesh), recorded_choices() as chosen:
            self.step_fn.trace(self.target, self.frozen, batch_shapes(self.config, self.model, self.mesh))
        decided = {"attention": "; ".join(sorted(map(str, chosen)))}
        if (
            self.mesh.shape["fsdp"] * self.mesh.shape["tensor"] > 1
        ):  # else all of them are whole, as was asked for
            decided["replicated"] = str(rules.replicated(self.mesh, self.boxed_params))
        return decided

    def begin(self, store: Checkpoints, rewinds: Sequence[Rewind]) -> tuple[TrainState, SpikeDetector, Any]:
        """(state, spike detector, loader) from the newest checkpoint that `rewinds` leave, else from step 0.

        Raises:
          UserError: a checkpoint that is damaged, of another run, or trained with other frozen weights.
        """
        for step in store.all_steps() if rewinds else ():
            if rewind.is_void(step, store.extra(step).get("rewinds", 0), rewinds):
                store.remove(step)
        config, extra = self.config, dict[str, Any]()
        if store.latest_step() is None:
            state = self.init(jax.random.key(config.seed))
            pretrained = frozen_weights.open_trained(self.model, self.mesh, self.boxed_params)
            if pretrained:
                places = jax.tree.map(lambda leaf: leaf.sharding, self.target)
                state = jax.jit(start_from, out_shardings=places, donate_argnums=0)(state, pretrained)
        else:
            state, extra = store.restore(None, self.target)
            frozen_weights.check_frozen(self.frozen_hash, extra, str(store.directory))
        loader = make_loader(
            self.source, self.model.text_encoder.tokenize, batch=config.batch, seed=config.seed,
            positions=self.positions, start_step=int(state.step),
            data_step=functools.partial(rewind.data_step, rewinds=tuple(rewinds)),
            captions=CaptionPolicy(**config.captions),
            threads=config.loader.threads, prefetch=config.loader.prefetch,
        )  # fmt: skip
        return state, SpikeDetector(config.rewind, extra.get("losses", ())), loader

    def extra(self, rewinds: Sequence[Rewind], spikes: SpikeDetector) -> dict[str, Any]:
        """What a checkpoint says next to the state."""
        return {"frozen_sha256": self.frozen_hash, "rewinds": len(rewinds), "losses": spikes.recent}
