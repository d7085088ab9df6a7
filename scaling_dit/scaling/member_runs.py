"""One run of a study: trained to its end and evaluated at every point, whatever of that is left to do.

What can be known to fail, such as data with too few prompts, fails before anything is trained.
"""

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
from etils import epath

from scaling_dit import config as config_lib
from scaling_dit import files, signals
from scaling_dit.checkpoints.frozen_base import absolute
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.errors import StorageError, UserError
from scaling_dit.evaluation import conditioned
from scaling_dit.evaluation import run as evaluation
from scaling_dit.evaluation.metric import Skipped
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.scoring import together
from scaling_dit.model.build import open_source
from scaling_dit.parallel import processes
from scaling_dit.scaling import parity, table
from scaling_dit.scaling import spec as spec_lib
from scaling_dit.scaling.folder import StudyFolder, scores_folder
from scaling_dit.scaling.ladder import Member
from scaling_dit.scaling.spec import StudySpec
from scaling_dit.training import loop
from scaling_dit.training.base import Start

# Sections of a config that its data and the prompts of its metrics depend on.
_OF_PROMPTS = ("source", "captions", "codec", "eval", "metrics", "conditioning", "conditions")


def check(spec: StudySpec, members: Iterable[Member]) -> None:
    """Makes sure that the data of members are there, and that every metric has its prompts; each data are opened once.

    Networks that a metric needs are not opened: they would lie in memory beside the training. All processes call this,
    and what one of them lacks ends all of them.

    Raises:
      UserError: missing data, or a metric that does not fit them, lacks what it needs (weights, a judge, packages), has
        fewer prompts than the study asks for, or conditions that the member does not read.
    """
    seen = set()
    for member in members:
        fields = config_lib.flatten(member.config).items()
        data = parity.identity({key: value for key, value in fields if key.partition(".")[0] in _OF_PROMPTS})
        if data in seen:
            continue
        seen.add(data)
        try:
            with together():
                _check_member(spec, member)
        # Around `together`, which tells Skipped from other mistakes.
        except UserError as error:
            kind = StorageError if isinstance(error, StorageError) else UserError
            raise kind(f"member {member.name!r}: {error}") from error


def _check_member(spec: StudySpec, member: Member) -> None:
    source = open_source(member.config)
    for one in choose(member.config, spec.metrics):
        if check_ready := getattr(one.metric, "check_ready", None):
            try:
                check_ready()
            except Skipped as missing:
                # Some name the metric themselves.
                text = str(missing)
                raise Skipped(
                    text if text.startswith("metric ") else f"metric {one.name!r}: {text}"
                ) from missing
        items = one.prompts(source, spec.items).items
        conditioned.check(items, member.config.conditioning.names, one.section)


def finish(
    spec: StudySpec, folder: StudyFolder, member: Member, seed: int, *, base_stopped: bool = False
) -> None:
    """Trains one run to its end and evaluates it at every point.

    A run whose loss is not finite, or keeps spiking, is over: it has that status in the table, and the study continues.

    Args:
      base_stopped: whether the run that this one begins from ended early.

    Raises:
      Stopped: a signal arrived; the same call resumes.
      UserError: a metric cannot be computed here.
    """
    run = folder.run(member.name, seed)
    config = spec.run_config(member, seed, str(folder.compile_cache))
    start = None
    # A run that exists has its base's weights. One of adapters reads them at each start, wherever they lie now. Process
    # 0 answers such questions for all: it writes, and another may look too early.
    if member.base and (config.adapter.rank or not processes.first_says(run.config.exists())):
        start = Start(absolute(str(folder.run(member.base, seed))))
    if member.base and base_stopped:
        reason = f"{member.base}, which it begins from, has stopped"
        _note_stop(folder, member, seed, loop.NONFINITE, reason)
        return
    try:
        loop.train(config, run.folder, start=start)
    except loop.Stopped as stop:
        if stop.code == loop.PREEMPTED:
            raise
        _note_stop(folder, member, seed, stop.code, str(stop))
        return
    _note_memory(folder.memory(member.name, seed))
    with processes.preemption() as preempted:
        for step in spec_lib.point_steps(config.steps, spec.points):
            wanted = table.results(spec, run, step)
            for (_, generation, scale), path in wanted.items():
                if processes.first_says(path.exists()):
                    continue
                if preempted():
                    raise loop.Stopped(
                        signals.exit_code(), f"{signals.name()}: the same command resumes the study"
                    )
                _evaluate(spec, run, step, generation, scale)
                if not processes.first_says(path.exists()):
                    raise UserError(
                        f"evaluating step {step} of {run} left no {path}; the line above says why a metric was "
                        "skipped: install what it needs and give the same command again"
                    )
    _keep_last(run.checkpoints)


def _note_stop(folder: StudyFolder, member: Member, seed: int, code: int, reason: str) -> None:
    """Writes down that a run is over before its last step; process 0 does."""
    if jax.process_index() != 0:
        return
    path = folder.stopped(member.name, seed)
    # A run that never began has no folder.
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, files.to_json({"code": code, "reason": reason}).encode())


def _evaluate(spec: StudySpec, run: Any, step: int, generation: int, scale: float | None) -> None:
    """Scores one checkpoint by all metrics, as `scaling-dit evaluate` does."""
    out = scores_folder(run, step, generation, spec.items, scale)
    # What it prints is for people who wait; a program reads what this command prints.
    with contextlib.redirect_stdout(sys.stderr):
        evaluation.main(
            str(run),
            str(out),
            metrics=spec.metrics,
            items=spec.items,
            seed=generation,
            step=step,
            changes={} if scale is None else {"guidance": scale},
        )


def _note_memory(path: epath.Path) -> None:
    """Writes what the devices' driver says of the most memory in use; nothing where it does not count."""
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    counted = [value for value in used if value is not None]
    if counted and jax.process_index() == 0:
        files.write_whole(path, files.to_json({"peak_bytes": max(counted)}).encode())


def _keep_last(folder: epath.Path) -> None:
    """Removes the checkpoints of a run that is evaluated, all but the last: they take most of a study's disk."""
    with Checkpoints(folder) as store:
        steps = store.all_steps()[:-1]
        # All processes have listed them before the first one is gone.
        processes.barrier()
        for step in steps:
            store.remove(step)
