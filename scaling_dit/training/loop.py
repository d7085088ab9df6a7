"""Training: one flat loop around the pure step of `train_step.py`.

`train` builds the run, goes on from its last checkpoint if there is one, and loops: read a batch, step, log, save,
look. Everything random in step s is drawn from (seed, s) for the whole global batch, and the data of step s are a
function of (seed, s, rewinds on record); so a run that was killed anywhere and started again ends with the same
parameters, bit for bit, on the same machine and layout.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import files
from scaling_dit.checkpoints.posthoc_ema import Snapshots
from scaling_dit.checkpoints.state import TrainState
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import CHECKPOINTS, claim_workdir, open_workdir
from scaling_dit.data.damage import damage_of
from scaling_dit.monitor import goodput
from scaling_dit.monitor.goodput import CHECKPOINT, DATA_WAIT, EVALUATION, OTHER, STEP
from scaling_dit.monitor.profile import Profiler
from scaling_dit.monitor.progress import Progress
from scaling_dit.monitor.writers import MultiWriter, create_writer, read_metrics
from scaling_dit.parallel import compile_cache, processes, rules
from scaling_dit.training import rewind
from scaling_dit.training.rewind import Rewind, Spike
from scaling_dit.training.run import Run
from scaling_dit.training.step import make_train_step

# Used elsewhere under these names.
__all__ = ["Stopped", "claim_workdir", "main", "make_train_step", "open_workdir", "train"]

DONE, NONFINITE, SPIKE, PREEMPTED = 0, 3, 4, 75  # exit codes; 75 is EX_TEMPFAIL: the same command goes on


class Stopped(Exception):
    """A run that ended early on purpose; `code` is the exit code and the message one line for the user."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main(config: ConfigDict, workdir: str, began: float | None = None) -> int:
    """The `train` verb: `train` with exit codes.

    0 done, 3 non-finite loss, 4 loss spikes beyond `config.rewind.limit`, 75 stopped by SIGTERM after saving.
    """
    try:
        train(config, workdir, began=began)
    except Stopped as stop:
        print(f"scaling-dit: {stop}", file=sys.stderr)
        return stop.code
    return DONE


def train(
    config: ConfigDict,
    workdir: str | epath.Path,
    devices: Sequence[jax.Device] | None = None,
    *,
    began: float | None = None,
) -> TrainState:
    """Trains a run to `config.steps`, from its last checkpoint if the workdir has one.

    Args:
      config: of an experiment; missing fields take their defaults.
      workdir: folder of the run, local or gs://. It gets `config.json`, `tokenizer.json`, `checkpoints/`, `metrics/`,
        `goodput/`, and TensorBoard events and profiles.
      devices: those to train on; all by default.
      began: when the command was given, in seconds since 1970, for goodput; now by default.

    Returns:
      The final state, sharded over the run's mesh.

    Raises:
      UserError: a mistake in the config or the data, or a workdir of another experiment.
      Stopped: SIGTERM arrived (the state is saved), too many updates in a row were not finite, or too many spikes.
    """
    watch = goodput.Stopwatch(began)
    compile_cache.use(config_lib.resolve(config).compile_cache, workdir)
    run = Run.open(config, epath.Path(workdir), devices)
    config, workdir = run.config, run.workdir
    rewinds = rewind.read(workdir)
    with (
        goodput.Recorder(workdir, watch) as recorder,
        open_checkpoints(run) as store,
        Snapshots(workdir, config) as snapshots,
        create_writer(workdir, tensorboard=config.log.tensorboard) as writer,
        Profiler(workdir / "tensorboard", config.log.profile) as profiler,
        damage_listed(run),
        processes.preemption() as preempted,
    ):
        state, spikes, loader = run.begin(store, rewinds)
        step = int(state.step)
        snapshots.back_to(step)
        recorder.tell("resumed", step)
        progress = Progress(config.steps, step, config.batch, watch, enabled=jax.process_index() == 0)
        if step == 0 and config.rewind.factor:  # so that the first spikes have something to go back to
            store.save(step, state, run.extra(rewinds, spikes))
        open_metrics(run, writer, state, rewinds)
        if step and run.looks.due(step) and processes.first_says(not evaluated(workdir, step)):
            # killed between saving and looking
            with watch.part(EVALUATION):
                run.looks.write(writer, step, state, run.frozen)

        watch.switch(STEP)
        while step < config.steps:
            snapshots.save(step, state)
            step += 1
            with watch.part(DATA_WAIT):
                batch = rules.to_global(next(loader), run.mesh, config.batch)
            with rules.activate(run.mesh), profiler.step(step):
                state, metrics = run.step_fn(state, run.frozen, batch)
            profiler.after(step, metrics)
            spikes.add(step, metrics["loss"])
            last, stop = step == config.steps, preempted()  # once a step: a later signal waits
            log = step % config.log.every == 0 or last or stop
            save = step % config.checkpoint.every == 0 or last or stop
            if not (log or save or run.looks.due(step)):
                continue  # the host runs ahead of the devices
            jax.block_until_ready(metrics)
            recorder.tell("step", step)
            if log:
                with watch.part(OTHER):
                    write_log(run, writer, progress, step, metrics)
                if metrics["skipped_in_a_row"] >= config.optim.max_nonfinite:
                    raise nonfinite(config, step, store)
            if (log or save) and (spike := spikes.first()) is not None:
                with watch.part(OTHER):
                    recorder.tell("spike", step)
                    rewinds.append(record_rewind(run, store, spike, rewinds))
                    loader.close()
                    del state, metrics  # the memory is needed for the one restored
                    state, spikes, loader = run.begin(store, rewinds)
                    step = int(state.step)
                    for record in (snapshots, writer, progress):
                        record.back_to(step)
                    recorder.tell("back", step)
                continue
            if save:
                with watch.part(CHECKPOINT):
                    snapshots.wait()  # so that no checkpoint is ahead of them
                    writer.flush()  # nor of the metrics: steps before it are not made again
                    store.save(step, state, run.extra(rewinds, spikes), wait=last or stop)
                recorder.tell("saved", step)
            if stop and not last:
                raise Stopped(PREEMPTED, f"SIGTERM: saved step {step}; the same command goes on from there")
            if run.looks.due(step):
                with watch.part(EVALUATION):
                    run.looks.write(writer, step, state, run.frozen)
        watch.switch(OTHER)
        progress.close()
        loader.close()
    goodput.show(workdir)
    return state


def open_checkpoints(run: Run) -> Checkpoints:
    """The run's checkpoints, kept as its config says."""
    keep = run.config.checkpoint
    folder = run.workdir / CHECKPOINTS
    # A rewind goes back to regular ones, so that where it goes does not depend on signals.
    every = keep.every if run.config.rewind.factor else 1
    return Checkpoints(folder, keep_last=keep.keep_last, keep_every=keep.keep_every, every=every)


@contextlib.contextmanager
def damage_listed(run: Run) -> Iterator[None]:
    """Lists the damaged records met however the run ends, for one of them may have ended it."""
    try:
        yield
    finally:
        damage_of(run.source).save(run.workdir, jax.process_index())


def open_metrics(run: Run, writer: MultiWriter, state: TrainState, rewinds: Sequence[Rewind]) -> None:
    """Writes what the metrics of a start begin with: a new run's config and parameters, or where it goes on.

    What was decided for this start's devices is printed, for it may differ from start to start.
    """
    step, decisions = int(state.step), run.decisions()
    if jax.process_index() == 0:
        for name, decided in decisions.items():
            print(f"scaling-dit: {name}: {decided}", file=sys.stderr)
    if step == 0:
        writer.hparams(config_lib.flatten(run.config) | decisions)
        writer.parameter_overview(state.params)
    if rewinds:
        writer.back_to(step)  # in case a kill came before it


def write_log(
    run: Run, writer: MultiWriter, progress: Progress, step: int, metrics: Mapping[str, jax.Array]
) -> None:
    """Writes the metrics of a step, its speed and the damaged records so far, and shows the loss."""
    values = {name: float(value) for name, value in metrics.items()}
    rates = progress.rates(step)
    writer.scalars(step, {f"train/{name}": value for name, value in values.items()} | rates)
    damage = damage_of(run.source)
    if met := damage.check(processes.total(damage.counts())):
        writer.scalars(step, met)
        damage.save(run.workdir, jax.process_index())
    progress.update(step, loss=values["loss"])


def record_rewind(run: Run, store: Checkpoints, spike: Spike, rewinds: Sequence[Rewind]) -> Rewind:
    """Decides where to go back to from a spike and writes that down, before anything follows from it.

    Raises:
      Stopped: too many rewinds already, or no checkpoint is old enough.
    """
    settings, every = run.config.rewind, run.config.checkpoint.every
    told = f"loss {spike.loss:.4g} at step {spike.step} is over {settings.factor:g} x the median {spike.median:.4g}"
    store.wait()
    if len(rewinds) >= settings.limit:
        kept = store.latest_step()
        raise Stopped(
            SPIKE,
            f"{told}, after {len(rewinds)} rewinds, as many as config.rewind.limit allows; last checkpoint: "
            f"{'none' if kept is None else f'step {kept}'}. Lower config.optim.learning_rate, or raise the limit",
        )
    new = rewind.plan(spike.step, rewinds, store.all_steps(), settings, every)
    if new is None:
        raise Stopped(
            SPIKE, f"{told}, and no checkpoint is {settings.back} steps older; lower config.rewind.back"
        )
    if jax.process_index() == 0:
        files.write_whole(run.workdir / rewind.FILE, rewind.text([*rewinds, new]).encode())
        print(
            f"scaling-dit: {told}: back to step {new.to}, without data steps {new.data_from} to {new.data_to - 1}",
            file=sys.stderr,
        )
    return new


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
