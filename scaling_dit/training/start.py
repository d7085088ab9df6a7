"""The start of a run, before its first step: data, model, programs, weights, and its first state."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import storage
from scaling_dit.checkpoints.frozen_base import SHA256, FrozenBase, check_base
from scaling_dit.checkpoints.lease import Held, Lease
from scaling_dit.checkpoints.state import TrainState, start_from
from scaling_dit.checkpoints.store import Checkpoints, Damaged
from scaling_dit.checkpoints.workdir import (
    Workdir,
    check_resumed_weights,
    check_tokenizer,
    claim_workdir,
    load_tokenizer,
    open_workdir,
    tokenizer_hash,
    unfinished_start,
)
from scaling_dit.config.own_code import changes, source_hashes
from scaling_dit.data.buckets import Bucket, describe, open_buckets
from scaling_dit.data.captions import CaptionPolicy
from scaling_dit.data.loader import make_loader
from scaling_dit.data.sources import Source
from scaling_dit.encoders import Tokenizer
from scaling_dit.errors import UserError
from scaling_dit.evaluation.in_training import InTraining
from scaling_dit.model.adapters import BASE
from scaling_dit.model.build import build_model, open_source
from scaling_dit.model.codec_identity import check_source
from scaling_dit.model.frozen import check_frozen, frozen_hash, open_frozen, open_trained, save_frozen
from scaling_dit.model.model import Model
from scaling_dit.parallel import processes, rules
from scaling_dit.training import rewind, stages
from scaling_dit.training.adapters import base_of, read_base
from scaling_dit.training.base import Start, open_base
from scaling_dit.training.memory import check_fits
from scaling_dit.training.program import StepProgram, run_mesh, shared
from scaling_dit.training.rewind import Rewind, SpikeDetector
from scaling_dit.training.stage_configs import check_configs
from scaling_dit.trees import Params


@dataclasses.dataclass(frozen=True)
class Run:
    """A run ready to begin: everything but the state.

    Attributes:
      config: resolved.
      workdir: the folder of the run.
      source: the training split.
      model: modules without weights.
      program: the jitted functions, and the shapes and shardings of what they take.
      positions: rows of the global batch that this process reads.
      frozen: weights that are not trained, in their shardings.
      frozen_hash: their hash, which every checkpoint holds.
      tokenizer_hash: of the run's tokenizer, likewise.
      evaluator: what `config.eval` asks for.
      base: of a run that trains adapters; its parameters are `frozen["base"]`.
      buckets: those that `config.buckets` groups the images in.
    """

    config: ConfigDict
    workdir: Workdir
    source: Source
    model: Model
    program: StepProgram
    positions: np.ndarray
    frozen: Params
    frozen_hash: str
    tokenizer_hash: str
    evaluator: InTraining
    base: FrozenBase | None = None
    buckets: tuple[Bucket, ...] = ()

    @classmethod
    def open(
        cls,
        config: ConfigDict,
        workdir: Workdir,
        devices: Sequence[jax.Device] | None = None,
        lease: Lease | None = None,
        start: Start | None = None,
        first: Callable[[Self], None] | None = None,
    ) -> Self:
        """Builds a run and claims the workdir for it, last of all: a start that fails here leaves no trace.

        Args:
          config: of the run, resolved.
          workdir: of the run, new or its own.
          devices: those to train on; all by default.
          lease: of the workdir, taken before the first write.
          start: what a new run begins from, or for adapters the base that they are trained beside; a run that is
            resumed reads only the latter again.
          first: writes the first checkpoint of a new run whose state comes from elsewhere. It is called with the lease
            taken and before the config is written, for a folder with a config is resumed, or trained from nothing.

        Raises:
          UserError: a mistake in the config or the data, a workdir of another experiment, or of another process.
          StorageError: the disk or bucket refuses to be written.
        """
        fresh = not workdir.config.exists()
        beside = base_of(config, workdir, start)
        base = open_start(workdir, start) if beside is None else None
        mesh = run_mesh(config, devices)
        positions = rules.local_positions(mesh, config.batch)
        # A microbatch must split over the devices as well.
        rules.local_positions(mesh, config.batch // config.optim.accumulate)
        source = open_source(config)
        given = tokenizer_of(config, base, beside if fresh else None)
        tokenizer = open_workdir(workdir, config, source, given)
        model = build_model(config, tokenizer, source)
        if start is not None and (base or beside):
            # Shapes alone do not say how many heads a kernel has.
            check_configs(base or open_base(start), config, model)

        # Shapes first, then straight into their shardings.
        program = shared(config, model, mesh)
        buckets = read_buckets(source, config, model, program)
        check_fits(config.batch, config.loader.prefetch, len(positions), program)
        kept = workdir.frozen if not fresh else beside and beside.workdir.frozen
        lent = open_lent(kept, base, config, model, program)
        frozen = {name: lent[name] for name in program.boxed_frozen if name != BASE}
        check_source(source, config, model.codec, frozen["codec"])
        evaluator = InTraining(model, source, mesh, config, program.adapters)
        digest, words = frozen_hash(frozen, *model.encoders), tokenizer_hash(workdir, tokenizer)
        whole = dict(frozen)
        if beside is not None:
            whole[BASE], beside = read_base(beside, mesh, program.boxed_frozen[BASE], digest, words)
        if not unfinished_start(workdir):
            check_resumed_weights(workdir, digest, words)
        run = cls(
            config=config,
            workdir=workdir,
            source=source,
            model=model,
            program=program,
            positions=positions,
            frozen=whole,
            frozen_hash=digest,
            tokenizer_hash=words,
            evaluator=evaluator,
            base=beside,
            buckets=buckets,
        )
        if base is not None:
            # Read before anything is written, for what does not fit must leave no trace.
            begun = stages.first_state(base, program, run.random_state(), lent, config, model)
        take(lease, workdir, fresh)
        if base is not None:
            stages.save(workdir, base, config, begun, run.extra((), SpikeDetector(config.rewind)))
        if first is not None:
            first(run)
        claiming = functools.partial(claim, run, tokenizer, fresh)
        storage.patiently(claiming, f"to {workdir}", config.checkpoint.retry)
        return run

    def begin(
        self, store: Checkpoints, rewinds: Sequence[Rewind], *, strict: bool = False
    ) -> tuple[TrainState, SpikeDetector, Any]:
        """(state, spike detector, loader) of the newest sound checkpoint that `rewinds` leave, else of step 0.

        Args:
          strict: refuse a damaged checkpoint, which is set aside otherwise.

        Raises:
          UserError: a checkpoint of another run, or trained with other frozen weights; damage, as `restore_newest`.
          StorageError: the disk or bucket refuses to be read.
        """
        for step in store.all_steps() if rewinds else ():
            try:
                before = store.extra(step).get("rewinds", 0)
            except Damaged:
                # Met again below, if it is newer than all sound ones.
                continue
            if rewind.is_void(step, before, rewinds):
                store.remove(step)
        config, extra = self.config, dict[str, Any]()
        if store.latest_step() is None:
            if self.workdir.start.exists():
                raise UserError(
                    f"{self.workdir} began from another run's weights, and its checkpoints are gone; put one back, or "
                    "give another --workdir and --from again"
                )
            state = self.fresh_state()
        else:
            aside = self.workdir.damaged_checkpoints
            state, extra = store.restore_newest(self.program.state, aside, strict=strict)
            check_frozen(self.frozen_hash, extra, str(store.directory))
            check_tokenizer(self.tokenizer_hash, extra, str(store.directory))
            if self.base is not None:
                check_base(self.base, extra, str(store.directory))
            notice_changed_code(self.config, extra, int(state.step))
        loader = self.loader(int(state.step), rewinds)
        return state, SpikeDetector(config.rewind, extra.get("losses", ())), loader

    def loader(self, start_step: int = 0, rewinds: Sequence[Rewind] = ()) -> Any:
        """The batches of this process from a step on."""
        config = self.config
        return make_loader(
            self.source, self.model.text_encoder.tokenize, batch=config.batch, seed=config.seed,
            positions=self.positions, start_step=start_step,
            data_step=functools.partial(rewind.data_step, rewinds=tuple(rewinds)),
            captions=CaptionPolicy(**config.captions),
            conditions={one.name: one.condition for one in self.model.conditions},
            threads=config.loader.threads, prefetch=config.loader.prefetch, buckets=self.buckets,
        )  # fmt: skip

    def fresh_state(self) -> TrainState:
        """The state of step 0, in its shardings: initialised from the seed, but for pretrained weights."""
        program, state = self.program, self.random_state()
        # Of adapters the base's parameters are given, and no others.
        pretrained = self.base is None and open_trained(self.model, program.mesh, program.boxed_params)
        if pretrained:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
            state = jax.jit(start_from, out_shardings=shardings, donate_argnums=0)(state, pretrained)
        return state

    def random_state(self) -> TrainState:
        """The state of step 0, in its shardings, initialised from the seed."""
        state: TrainState = self.program.init(jax.random.key(self.config.seed))
        return state

    def extra(self, rewinds: Sequence[Rewind], spikes: SpikeDetector) -> dict[str, Any]:
        """The values that a checkpoint holds beside the state."""
        return self.held() | {"rewinds": len(rewinds), "losses": spikes.recent}

    def held(self) -> dict[str, Any]:
        """The values that name what the state is used with."""
        hashes = {
            "frozen_sha256": self.frozen_hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "own_code_sha256": source_hashes(self.config),
        }
        return hashes if self.base is None else hashes | {SHA256: self.base.sha256}


def tokenizer_of(config: ConfigDict, base: Any, beside: FrozenBase | None) -> Any:
    """The tokenizer that a new run takes over from what it begins from or is trained beside; None if from neither."""
    if beside is not None:
        return load_tokenizer(config, beside.workdir)
    return None if base is None else base.tokenizer()


def claim(run: Run, tokenizer: Tokenizer, fresh: bool) -> None:
    """Writes what makes a folder this run's, its config last; all processes call it."""
    frozen = {name: tree for name, tree in run.frozen.items() if name != BASE}
    save_frozen(run.workdir.frozen, run.model, frozen, replace=fresh)
    if run.base is not None and jax.process_index() == 0:
        run.base.save(run.workdir.base)
    claim_workdir(run.workdir, run.config, tokenizer)


def open_lent(
    kept: epath.Path | None, base: stages.Base | None, config: ConfigDict, model: Model, program: StepProgram
) -> Params:
    """The frozen weights of a run, and those of a base's that it trains; see `open_frozen` and `RunBase.frozen`."""
    boxed = {name: tree for name, tree in program.boxed_frozen.items() if name != BASE}
    if base is None:
        return open_frozen(kept, model, config.seed, program.mesh, boxed)
    return base.frozen(model, config.seed, program.mesh, boxed, program.boxed_params)


def read_buckets(
    source: Source, config: ConfigDict, model: Model, program: StepProgram
) -> tuple[Bucket, ...]:
    """The buckets of a run's source, printed in one line; none without `config.buckets`.

    Raises:
      UserError: a source without buckets, or one whose images codec or backbone cannot take.
    """
    if not config.buckets:
        return ()
    buckets = open_buckets(source)
    for bucket in buckets:
        check_bucket(bucket, model, program)
    if jax.process_index() == 0:
        print(f"scaling-dit: buckets: {describe(buckets)}", file=sys.stderr)
    return buckets


def check_bucket(bucket: Bucket, model: Model, program: StepProgram) -> None:
    """Makes sure that codec and backbone take a batch of a bucket's size on the run's mesh, before any step does.

    It is traced with the run's image conditions, as the step will be; nothing is computed.

    Raises:
      UserError: they do not, and why.
    """
    height, width = bucket.bucket_size
    ids, mask = program.batch["ids"], program.batch["mask"]

    def pixels(channels: int) -> jax.ShapeDtypeStruct:
        shape = len(ids), height, width, channels
        return jax.ShapeDtypeStruct(shape, np.uint8, sharding=ids.sharding)

    given = {one.name: pixels(3 + one.condition.masks) for one in model.conditions}

    def predict(params: Params, frozen: Params, images: Any, given: Any, ids: Any, mask: Any) -> jax.Array:
        params = params if program.adapters is None else program.adapters.add(frozen[BASE], params)
        latents = model.encode_image(frozen, images, jax.random.key(0))
        text, text_mask, _ = model.encode_text(params, frozen, ids, mask)
        conditions = model.present_conditions(frozen, given) if given else None
        return model.predict(params, latents, jnp.zeros(len(ids)), text, text_mask, conditions)

    try:
        with rules.activate(program.mesh):
            jax.eval_shape(predict, program.state.params, program.frozen, pixels(3), given, ids, mask)
    except (UserError, ValueError) as error:
        # What JAX says of shapes has several lines.
        why = str(error).partition("\n")[0][:300]
        raise UserError(
            f"config.buckets: images of {height}x{width} px do not fit ({why}); choose a config.source.image_size "
            "whose eighth is a multiple of the codec's factor times the backbone's patch, or change what is named here"
        ) from None


def open_start(workdir: Workdir, start: Start | None) -> stages.Base | None:
    """The base of a run that begins now; None for one that begins from nothing, or is resumed.

    Raises:
      UserError: as `open_base`; a run that began from something else; or a start cut short, without its base.
    """
    unfinished = unfinished_start(workdir)
    # A run that lost its config, and has checkpoints, is no new one.
    is_new = unfinished or not (workdir.config.exists() or workdir.checkpoints.exists())
    if start is not None and not is_new:
        stages.check_same_start(workdir, start)
    if start is None and unfinished:
        raise UserError(
            f"a start in {workdir} was cut short before it had its weights; give the same command with its --from again"
        )
    return open_base(start) if start is not None and is_new else None


def take(lease: Lease | None, workdir: Workdir, fresh: bool) -> None:
    """Takes the lease of a workdir in the first process, unless it has it already; all processes call it.

    Args:
      fresh: whether the folder held no run when this start looked.

    Raises:
      UserError: another process has the lease, or began a run there meanwhile.
    """

    def acquire() -> None:
        if lease is not None:
            lease.acquire()
        if fresh and workdir.config.exists():
            raise Held(
                f"another process began a run in {workdir} meanwhile; if it is this run, the same command resumes it"
            )

    processes.first_does(acquire)


def notice_changed_code(config: ConfigDict, extra: Mapping[str, Any], step: int) -> None:
    """Prints which parts of a user's own have another source file than when the checkpoint of `step` was saved.

    It stops nothing: a comment may have changed, or a fault been mended.
    """
    changed = changes(extra.get("own_code_sha256"), source_hashes(config))
    if changed and jax.process_index() == 0:
        print(
            f"scaling-dit: the source file of {', '.join(changed)} has changed since step {step} was saved; the run "
            "resumes with it as it is now",
            file=sys.stderr,
        )
