"""Training: one flat loop around the pure step of `train_step.py`.

`train` builds the run, goes on from its last checkpoint if there is one, and loops: read a batch, step, log, save,
look. Everything random in step s is drawn from (seed, s) for the whole global batch, and the data of step s are a
function of (seed, s); so a run that was killed anywhere and started again ends with the same parameters, bit for bit,
on the same machine and layout.
"""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import optim, pipeline
from scaling_dit.checkpoints import Checkpoints
from scaling_dit.data.loader import make_loader
from scaling_dit.encoders import scratch
from scaling_dit.errors import UserError
from scaling_dit.evaluation.in_training import InTraining
from scaling_dit.monitor.progress import Progress
from scaling_dit.monitor.writers import create_writer, read_metrics
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.state import TrainState
from scaling_dit.train_step import init_state, make_train_step

DONE, NONFINITE, PREEMPTED = 0, 3, 75  # exit codes; 75 is EX_TEMPFAIL: the same command goes on


class Stopped(Exception):
    """A run that ended early on purpose; `code` is the exit code and the message one line for the user."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(config: ConfigDict, workdir: str) -> int:
    """The `train` verb: `train` with exit codes (0 done, 3 non-finite loss, 75 stopped by SIGTERM after saving)."""
    try:
        train(config, workdir)
    except Stopped as stop:
        print(f"scaling-dit: {stop}", file=sys.stderr)
        return stop.code
    return DONE


def train(
    config: ConfigDict, workdir: str | epath.Path, devices: Sequence[jax.Device] | None = None
) -> TrainState:
    """Trains a run to `config.steps`, from its last checkpoint if the workdir has one.

    Args:
      config: of an experiment; missing fields take their defaults.
      workdir: folder of the run, local or gs://. It gets `config.json`, `tokenizer.json`, `checkpoints/`, `metrics/`
        and TensorBoard events.
      devices: those to train on; all by default.

    Returns:
      The final state, sharded over the run's mesh.

    Raises:
      UserError: a mistake in the config or the data, or a workdir of another experiment.
      Stopped: SIGTERM arrived (the state is saved), or too many updates in a row were not finite.
    """
    # --- what the run is made of ---
    config = config_lib.resolve(config)
    workdir = epath.Path(workdir)
    mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
    positions = rules.local_positions(mesh, config.batch)
    rules.local_positions(mesh, config.batch // config.optim.accumulate)  # a microbatch must split as well
    tokenizer = open_workdir(workdir, config)
    source = pipeline.create_source(config)
    model = pipeline.build(config, tokenizer)
    optimizer = optim.make_optimizer(config.optim, config.steps)

    # --- state: shapes first, then straight into its shardings ---
    init = functools.partial(init_state, model, optimizer, config)
    key = jax.random.key(config.seed)
    boxed_params, boxed_frozen = jax.eval_shape(model.init, key)
    abstract = jax.eval_shape(init, key)
    shardings = rules.state_shardings(mesh, abstract, rules.param_shardings(mesh, boxed_params))
    frozen = pipeline.frozen_weights(workdir, model, config.seed, mesh, boxed_frozen)
    extra = {"frozen_sha256": pipeline.frozen_hash(frozen)}
    step_fn = jax.jit(
        make_train_step(model, optimizer, config),
        in_shardings=(shardings, rules.param_shardings(mesh, boxed_frozen), rules.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    looks = InTraining(model, source, mesh, config)
    claim_workdir(workdir, config, tokenizer, frozen)  # only now: a start that failed above leaves no trace
    settings = config.checkpoint
    with (
        Checkpoints(
            workdir / pipeline.CHECKPOINTS, keep_last=settings.keep_last, keep_every=settings.keep_every
        ) as store,
        create_writer(workdir, tensorboard=config.log.tensorboard) as writer,
        sigterm_flag() as terminated,
    ):
        if store.latest_step() is None:
            state = jax.jit(init, out_shardings=shardings)(key)
        else:
            state = restore(store, abstract, shardings, frozen)
        start = int(state.step)
        if start == 0:
            writer.hparams(config_lib.flatten(config))
            writer.parameter_overview(state.params)
        loader = make_loader(
            source, model.text_encoder.tokenize, batch=config.batch, seed=config.seed, positions=positions,
            start_step=start, threads=config.loader.threads, prefetch=config.loader.prefetch,
        )  # fmt: skip
        progress = Progress(config.steps, start, config.batch, enabled=jax.process_index() == 0)

        # --- the loop ---
        if start and looks.due(start) and not evaluated(workdir, start):  # killed between saving and looking
            looks.write(writer, start, state, frozen)
        for step in range(start + 1, config.steps + 1):
            with progress.waiting():
                batch = rules.to_global(next(loader), mesh, config.batch)
            with rules.activate(mesh):
                state, metrics = step_fn(state, frozen, batch)
            last, stop = step == config.steps, terminated.is_set()  # read once: a later signal waits
            if step % config.log.every == 0 or last or stop:
                # Reading the metrics waits for the step; in between, the host runs ahead of the devices.
                values = {name: float(value) for name, value in metrics.items()}
                rates = progress.rates(step)
                writer.scalars(step, {f"train/{name}": value for name, value in values.items()} | rates)
                progress.update(step, loss=values["loss"])
                if values["skipped_in_a_row"] >= config.optim.max_nonfinite:
                    raise nonfinite(config, step, store)
            if last or stop or step % settings.every == 0:
                store.save(step, state, extra, wait=last or stop)
            if stop and not last:
                raise Stopped(PREEMPTED, f"SIGTERM: saved step {step}; the same command goes on from there")
            if looks.due(step):
                with progress.paused():
                    looks.write(writer, step, state, frozen)
        progress.close()
        loader.close()
    return state


def open_workdir(workdir: epath.Path, config: ConfigDict) -> scratch.WordTokenizer:
    """Checks that a workdir is new or holds this run; returns the run's tokenizer. Writes nothing."""
    if (workdir / pipeline.CONFIG_FILE).exists():
        config_lib.check_same_run(pipeline.read_config(workdir), config)
        return scratch.WordTokenizer.load(workdir / pipeline.TOKENIZER_FILE)
    if (workdir / pipeline.CHECKPOINTS).exists():
        raise UserError(f"{workdir} has checkpoints but no {pipeline.CONFIG_FILE}; give another --workdir")
    return scratch.build_tokenizer(pipeline.create_source(config))


def claim_workdir(
    workdir: epath.Path, config: ConfigDict, tokenizer: scratch.WordTokenizer, frozen: pipeline.Params
) -> None:
    """Makes a workdir this run's: tokenizer, frozen weights and config; what is there stays, but for the config.

    The config is written last, so a folder with a config has everything else, and anew at each start, for some of its
    sections may change between starts.
    """
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / pipeline.TOKENIZER_FILE).exists():
        tokenizer.save(workdir / pipeline.TOKENIZER_FILE)
    pipeline.save_frozen(workdir, frozen)
    pipeline.write_whole(workdir / pipeline.CONFIG_FILE, config_lib.to_json(config).encode())


def restore(
    store: Checkpoints, abstract: TrainState, shardings: TrainState, frozen: pipeline.Params
) -> TrainState:
    """The newest checkpoint in this run's shardings, after checking that its frozen weights are these."""
    state, saved = store.restore(None, pipeline.with_shardings(abstract, shardings))
    pipeline.check_frozen(frozen, saved, str(store.directory))
    return state


def evaluated(workdir: epath.Path, step: int) -> bool:
    """Whether the evaluation of a step is in the run's metrics."""
    return any(row["step"] == step and "validation/loss" in row for row in read_metrics(workdir))


def nonfinite(config: ConfigDict, step: int, store: Checkpoints) -> Stopped:
    """The end of a run whose loss has left the numbers; the last checkpoint stays as it is."""
    store.wait()
    kept = store.latest_step()
    return Stopped(
        NONFINITE,
        f"loss or gradient not finite for {config.optim.max_nonfinite} updates in a row, at step {step}; "
        f"parameters were kept as before them; last checkpoint: {'none' if kept is None else f'step {kept}'}. "
        "Lower config.optim.learning_rate, raise warm-up, or look at the data of these steps",
    )


@contextlib.contextmanager
def sigterm_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the loop can save before it ends. The old handler comes back after."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield event
        return
    old = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, old)
