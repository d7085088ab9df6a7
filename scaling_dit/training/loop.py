"""Training: one flat loop around the pure step of `step.py`.

`train` builds the run, resumes from its last checkpoint if there is one, and loops: read a batch, step, log, save,
evaluate. Everything random in step s is drawn from (seed, s) for the whole global batch, and the data of step s are a
function of (seed, s, rewinds on record). So a run that was killed anywhere and started again ends with the same
parameters, bit for bit, on the same machine and layout.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import signals, storage
from scaling_dit.checkpoints.lease import Lease, leased
from scaling_dit.checkpoints.posthoc_ema import Snapshots
from scaling_dit.checkpoints.state import TrainState
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, read_metrics
from scaling_dit.data.damage import damage_of
from scaling_dit.errors import UserError
from scaling_dit.monitor import goodput, heartbeat
from scaling_dit.monitor.goodput import CHECKPOINT, DATA_WAIT, EVALUATION, OTHER, STEP
from scaling_dit.monitor.profile import Profiler
from scaling_dit.monitor.progress import Progress
from scaling_dit.monitor.writers import MultiWriter, create_writer
from scaling_dit.parallel import compile_cache, processes, rules
from scaling_dit.training import rewind, watching
from scaling_dit.training.base import Start
from scaling_dit.training.program import place_seed
from scaling_dit.training.rewind import Rewind, Spike, SpikeDetector
from scaling_dit.training.start import Run
from scaling_dit.training.watching import Watcher

# Exit codes; 75 is EX_TEMPFAIL: the same command resumes.
DONE, NONFINITE, SPIKE, PREEMPTED = 0, 3, 4, signals.AGAIN


class Stopped(Exception):
    """A run that ended early on purpose; `code` is the exit code and the message one line for the user."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Outputs(NamedTuple):
    """Everything that a run writes to while it trains."""

    recorder: goodput.Recorder
    store: Checkpoints
    snapshots: Snapshots
    writer: MultiWriter
    profiler: Profiler
    watcher: Watcher
    lease: Lease


def main(
    config: ConfigDict,
    workdir: str,
    began: float | None = None,
    *,
    strict: bool = False,
    start: Start | None = None,
) -> int:
    """The `train` verb: `train` with exit codes.

    0 done, 3 non-finite loss, 4 loss spikes beyond `config.rewind.limit`; after saving, 75 stopped by SIGTERM or
    SIGHUP, and 130 by SIGINT.
    """
    try:
        train(config, workdir, began=began, strict=strict, start=start)
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
    strict: bool = False,
    start: str | epath.Path | Start | None = None,
) -> TrainState:
    """Trains a run to `config.steps`, from its last checkpoint if the workdir has one.

    Args:
      config: of an experiment; missing fields take their defaults.
      workdir: folder of the run, local or gs://; `Workdir` says what it gets.
      devices: those to train on; all by default.
      began: when the command was given, in seconds since 1970, for goodput; now by default.
      strict: refuse a damaged checkpoint, which is set aside otherwise, and the run resumes from an older one.
      start: what a new run's parameters begin as: the folder of a run, "RUN@STEP", a safetensors file of a backbone, or
        a `base.Start`, which can name an EMA as well. A run that is resumed does not read it again. For adapters
        (`config.adapter`) it is the run that they are trained beside, which every start reads.

    Returns:
      The final state, sharded over the run's mesh.

    Raises:
      UserError: a mistake in the config or the data, a workdir of another experiment or of another process, or a
        step that does not fit the devices' memory.
      StorageError: the disk or bucket refused for `config.checkpoint.retry` seconds; the last checkpoint is intact.
      Stopped: a signal arrived (the state is saved), too many updates in a row were not finite, or too many spikes.
    """
    watch = goodput.Stopwatch(began)
    config, folder = config_lib.resolve(config), Workdir(workdir)
    compile_cache.use(config.compile_cache, folder.compile_cache)
    with leased(folder.lease, str(folder)) as lease, memory_explained(config):
        if processes.first_says(folder.folder.exists()):
            # Now, and not after minutes of building; a start that fails in a new folder leaves no trace.
            processes.first_does(lease.acquire)
        begin = start if start is None or isinstance(start, Start) else Start.parse(start)
        run = Run.open(config, folder, devices, lease, begin)
        rewinds = rewind.read(folder.rewinds)
        with open_outputs(run, watch, lease) as outputs, processes.preemption() as preempted:
            state = run_steps(run, rewinds, outputs, watch, preempted, strict=strict)
    goodput.show(folder.goodput)
    return state


def run_steps(
    run: Run,
    rewinds: list[Rewind],
    outputs: Outputs,
    watch: goodput.Stopwatch,
    preempted: Callable[[], bool],
    *,
    strict: bool = False,
) -> TrainState:
    """Resumes a run and trains it to `config.steps`.

    Args:
      run: ready to begin.
      rewinds: those on record; new ones are appended.
      outputs: open ones of the run.
      watch: the stopwatch of this start.
      preempted: whether the run must stop at this step; all processes get the same answer.
      strict: as in `train`.

    Raises:
      UserError, StorageError, Stopped: as `train`.
    """
    config, mesh, evaluator = run.config, run.program.mesh, run.evaluator
    recorder, store, snapshots, _, profiler, watcher, _ = outputs
    # Several processes agree on where they stop once a step.
    interrupted = preempted if jax.process_count() == 1 else lambda: False
    state, spikes, loader = begin_steps(run, rewinds, outputs, watch, strict=strict)
    step = int(state.step)
    progress = Progress(config.steps, step, config.batch, watch, enabled=jax.process_index() == 0)
    seed, sizes = place_seed(config.seed, mesh), set[tuple[int, ...]]()
    watch.switch(STEP)
    watcher.heart.update(state=heartbeat.TRAINING)
    while step < config.steps:
        watcher.times.resume()
        snapshots.save(step, state)
        step += 1
        with watch.part(DATA_WAIT):
            batch = rules.to_global(next(loader), mesh, config.batch) | {"seed": seed}
        note_size(run, batch, sizes)
        dispatched = watcher.times.clock()
        with rules.activate(mesh), profiler.step(step):
            state, metrics = run.program.step(state, run.frozen, batch)
        watcher.times.add(step, metrics["loss"], dispatched)
        profiler.after(step, metrics)
        spikes.add(step, metrics["loss"])
        # Asked once a step: a later signal waits for the next one.
        last, stop = step == config.steps, preempted()
        log = step % config.log.every == 0 or last or stop
        save = step % config.checkpoint.every == 0 or last or stop
        if not (log or save or evaluator.due(step)):
            # The host runs ahead of the devices.
            continue
        jax.block_until_ready(metrics)
        watcher.times.pause()
        recorder.record("step", step)
        if log:
            write_log(run, outputs, watch, progress, step, metrics)
            if metrics["skipped_in_a_row"] >= config.optim.max_nonfinite:
                raise nonfinite(config, step, store)
        if (log or save) and (spike := spikes.first()) is not None:
            with watch.part(OTHER):
                recorder.record("spike", step)
                rewinds.append(record_rewind(run, store, spike, rewinds))
                loader.close()
                # The restored state needs their memory.
                del state, metrics
                state, spikes, loader = go_back(run, rewinds, outputs, progress, strict=strict)
                step = int(state.step)
            continue
        if save:
            save_state(run, outputs, watch, state, run.extra(rewinds, spikes), wait=last or stop)
        if stop and not last:
            raise stopped(step)
        if evaluator.due(step) and not evaluate(run, outputs, watch, state, interrupted):
            save_state(run, outputs, watch, state, run.extra(rewinds, spikes), wait=True)
            raise stopped(step)
    watch.switch(OTHER)
    progress.close()
    loader.close()
    return state


def begin_steps(
    run: Run, rewinds: Sequence[Rewind], outputs: Outputs, watch: goodput.Stopwatch, *, strict: bool
) -> tuple[TrainState, SpikeDetector, Any]:
    """(state, spike detector, loader) to train on from, and the outputs as they were at the step of that state.

    The evaluation of the step is made if the last start was killed between saving and evaluating.
    """
    state, spikes, loader = run.begin(outputs.store, rewinds, strict=strict)
    step = int(state.step)
    outputs.snapshots.back_to(step)
    outputs.recorder.record("resumed", step)
    if step == 0 and run.config.rewind.factor:
        # So that the first spikes have a checkpoint to go back to.
        outputs.store.save(step, state, run.extra(rewinds, spikes))
    again = step > 0 and run.evaluator.due(step) and processes.first_says(not evaluated(run.workdir, step))
    open_metrics(run, outputs, state, rewinds, again)
    if again:
        evaluate(run, outputs, watch, state)
    return state, spikes, loader


def go_back(
    run: Run, rewinds: Sequence[Rewind], outputs: Outputs, progress: Progress, *, strict: bool
) -> tuple[TrainState, SpikeDetector, Any]:
    """(state, spike detector, loader) of the checkpoint of the last rewind; all records go back to its step."""
    state, spikes, loader = run.begin(outputs.store, rewinds, strict=strict)
    step = int(state.step)
    for record in (outputs.snapshots, outputs.writer, progress):
        record.back_to(step)
    outputs.recorder.record("back", step)
    return state, spikes, loader


def note_size(run: Run, batch: Mapping[str, jax.Array], sizes: set[tuple[int, ...]]) -> None:
    """Says, of a run on buckets, that the step is compiled for the size of a batch when the first of it comes.

    Args:
      sizes: shapes of images or latents met so far; added to in place.
    """
    if not run.buckets:
        return
    found = batch.get("images", batch.get("latents"))
    assert found is not None
    if found.shape in sizes:
        return
    sizes.add(found.shape)
    if jax.process_index() == 0:
        size = "x".join(map(str, found.shape[1:3]))
        print(
            f"scaling-dit: the step is compiled for batches of {size}, program {len(sizes)} of {len(run.buckets)}",
            file=sys.stderr,
        )


def save_state(
    run: Run,
    outputs: Outputs,
    watch: goodput.Stopwatch,
    state: TrainState,
    extra: dict[str, Any],
    *,
    wait: bool,
) -> None:
    """Saves a checkpoint, once all that must not be older than it is on disk.

    Raises:
      StorageError: the disk or bucket refuses, or the workdir is gone.
      UserError: another process has taken the workdir over.
    """
    step = int(state.step)
    with watch.part(CHECKPOINT), outputs.watcher.during(heartbeat.SAVING):
        processes.first_does(lambda: check_writable(run, outputs))
        # No checkpoint may be ahead of snapshots or metrics: steps before it are not run again.
        outputs.snapshots.wait()
        outputs.store.save(step, state, extra, wait=wait)
    outputs.recorder.record("saved", step)


def check_writable(run: Run, outputs: Outputs) -> None:
    """Makes sure that the workdir is this run's and takes writes, or waits for it; writes the metrics so far.

    Of several processes the first does it while the others wait. Each would try to save again by itself, but all of
    them write one checkpoint together, so what refuses must show before they begin.

    Raises:
      StorageError: the disk or bucket refuses, or the workdir is gone.
      UserError: another process has taken the workdir over.
    """
    patience = run.config.checkpoint.retry
    storage.patiently(outputs.lease.check, f"to {run.workdir}", patience)
    outputs.writer.flush()
    if jax.process_count() > 1:
        path = run.workdir.writable
        storage.patiently(lambda: path.write_bytes(b""), str(path), patience)


def evaluate(
    run: Run,
    outputs: Outputs,
    watch: goodput.Stopwatch,
    state: TrainState,
    interrupted: Callable[[], bool] = lambda: False,
) -> bool:
    """Evaluates a state and writes the results; False if a signal ended it early."""
    with watch.part(EVALUATION), outputs.watcher.during(heartbeat.EVALUATING):
        return run.evaluator.write(outputs.writer, int(state.step), state, run.frozen, interrupted)


def stopped(step: int) -> Stopped:
    """The end of a run that a signal asked for, after saving."""
    return Stopped(
        signals.exit_code(), f"{signals.name()}: saved step {step}; the same command resumes from there"
    )


@contextlib.contextmanager
def open_outputs(run: Run, watch: goodput.Stopwatch, lease: Lease) -> Iterator[Outputs]:
    """Opens all outputs of a run and closes them however it ends."""
    config, folder = run.config, run.workdir
    tensorboard = folder.tensorboard if config.log.tensorboard else None
    with (
        goodput.Recorder(folder.goodput, watch) as recorder,
        open_checkpoints(run) as store,
        Snapshots(folder.ema_snapshots, config) as snapshots,
        create_writer(folder.metrics, tensorboard, config.checkpoint.retry) as writer,
        Profiler(folder.tensorboard, config.log.profile) as profiler,
        damage_listed(run),
        watching.watch(run, recorder) as watcher,
    ):
        yield Outputs(recorder, store, snapshots, writer, profiler, watcher, lease)


def open_checkpoints(run: Run) -> Checkpoints:
    """The run's checkpoints, kept as its config says."""
    keep = run.config.checkpoint
    # A rewind goes back to a regular checkpoint, so that signals do not change where it goes.
    every = keep.every if run.config.rewind.factor else 1
    return Checkpoints(
        run.workdir.checkpoints,
        keep_last=keep.keep_last,
        keep_every=keep.keep_every,
        every=every,
        verify_first=True,
        patience=keep.retry,
    )


@contextlib.contextmanager
def damage_listed(run: Run) -> Iterator[None]:
    """Lists the damaged records met, however the run ends: one of them may have ended it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            save_damage(run, 0.0)
        raise
    save_damage(run, run.config.checkpoint.retry)


def save_damage(run: Run, patience: float) -> None:
    """Lists the damaged records met so far."""
    path, process = run.workdir.damaged, jax.process_index()
    storage.patiently(lambda: damage_of(run.source).save(path, process), str(path), patience)


@contextlib.contextmanager
def memory_explained(config: ConfigDict) -> Iterator[None]:
    """Turns an error of devices without memory into one line that says what makes a step smaller."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0][:200]
        raise UserError(
            f"the devices have no memory for a step of batch {config.batch} ({first}); raise config.optim.accumulate "
            f"(now {config.optim.accumulate}), set config.backbone.remat where the backbone has it, or spread it over "
            "more devices; `scaling-dit plan` shows what fits"
        ) from error


def open_metrics(
    run: Run, outputs: Outputs, state: TrainState, rewinds: Sequence[Rewind], again: bool
) -> None:
    """Begins the metrics of a start: writes a new run's config and parameters, or where a resumed one goes back to.

    If the evaluation of the step is made `again`, what the last start wrote of it counts no more. The decisions for
    the devices of this start are printed, for they may differ from start to start.
    """
    step, writer = int(state.step), outputs.writer
    decisions = {**run.program.decisions, **outputs.watcher.decisions()}
    if jax.process_index() == 0:
        for name, decided in decisions.items():
            print(f"scaling-dit: {name}: {decided}", file=sys.stderr)
    shown = None
    if again:
        row = next((row for row in read_metrics(run.workdir) if row["step"] == step), {})
        made_again = ("step", "validation/", "evaluation/")
        shown = {name: value for name, value in row.items() if not name.startswith(made_again)}
    writer.begin(step, shown)
    if step == 0:
        writer.hparams(config_lib.flatten(run.config) | decisions)
        writer.parameter_overview(state.params)
    if rewinds:
        # Again, in case a kill came before it.
        writer.back_to(step)


def write_log(
    run: Run,
    outputs: Outputs,
    watch: goodput.Stopwatch,
    progress: Progress,
    step: int,
    metrics: Mapping[str, jax.Array],
) -> None:
    """Writes the metrics of a step, its speed and the number of damaged records so far, and shows the loss."""
    writer, damage = outputs.writer, damage_of(run.source)
    with watch.part(OTHER):
        values = {name: float(value) for name, value in metrics.items()}
        rates = progress.rates(step)
        rates |= outputs.watcher.scalars(rates["speed/steps_per_second"])
        writer.scalars(step, {f"train/{name}": value for name, value in values.items()} | rates)
        if met := damage.check(processes.total(damage.counts())):
            writer.scalars(step, met)
            save_damage(run, run.config.checkpoint.retry)
        progress.update(step, loss=values["loss"])


def record_rewind(run: Run, store: Checkpoints, spike: Spike, rewinds: Sequence[Rewind]) -> Rewind:
    """Decides where to go back to after a spike and writes the record, before anything follows from it.

    Raises:
      Stopped: too many rewinds already, or no checkpoint is old enough.
    """
    settings, every = run.config.rewind, run.config.checkpoint.every
    found = f"loss {spike.loss:.4g} at step {spike.step} is over {settings.factor:g} x the median {spike.median:.4g}"
    store.wait()
    if len(rewinds) >= settings.limit:
        kept = store.latest_step()
        raise Stopped(
            SPIKE,
            f"{found}, after {len(rewinds)} rewinds, as many as config.rewind.limit allows; last checkpoint: "
            f"{'none' if kept is None else f'step {kept}'}. Lower config.optim.learning_rate, or raise the limit",
        )
    new = rewind.plan(spike.step, rewinds, store.all_steps(), settings, every)
    if new is None:
        raise Stopped(
            SPIKE, f"{found}, and no checkpoint is {settings.back} steps older; lower config.rewind.back"
        )
    if jax.process_index() == 0:
        path = run.workdir.rewinds
        storage.patiently(lambda: rewind.write(path, [*rewinds, new]), str(path), run.config.checkpoint.retry)
        print(
            f"scaling-dit: {found}: back to step {new.to}, without data steps {new.data_from} to {new.data_to - 1}",
            file=sys.stderr,
        )
    return new


def evaluated(workdir: epath.PathLike, step: int) -> bool:
    """Whether the evaluation of a step is in the run's metrics."""
    return any(row["step"] == step and "validation/loss" in row for row in read_metrics(workdir))


def nonfinite(config: ConfigDict, step: int, store: Checkpoints) -> Stopped:
    """The end of a run whose loss is no longer finite; the last checkpoint stays as it is."""
    store.wait()
    kept = store.latest_step()
    return Stopped(
        NONFINITE,
        f"loss or gradient not finite for {config.optim.max_nonfinite} updates in a row, at step {step}; "
        f"parameters were kept as before them; last checkpoint: {'none' if kept is None else f'step {kept}'}. "
        "Lower config.optim.learning_rate, raise warm-up, or inspect the data of these steps",
    )
