"""A new run whose parameters begin as another's: `train --from`.

Step, optimizer and averages are fresh; every average begins at the parameters. An array of the base with the same path
and shape is copied, a table of positions is resized, and only what the new config adds may be fresh. Whatever else
differs is refused by name (of configs in `stage_configs.py`). What was taken from where is written to the run's folder,
and the state of step 0 is saved before the folder counts as a run: so no later start reads the base again.
"""

import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from scaling_dit import files, storage, trees
from scaling_dit.backbones.conditions import condition_of
from scaling_dit.checkpoints.checksums import params_hash
from scaling_dit.checkpoints.ema import plain_name
from scaling_dit.checkpoints.state import TrainState, start_from
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, unfinished_start
from scaling_dit.errors import UserError
from scaling_dit.model.model import Model
from scaling_dit.parallel import processes, rules
from scaling_dit.training import stage_configs
from scaling_dit.training.base import FileBase, Flat, RunBase, Start
from scaling_dit.training.program import StepProgram
from scaling_dit.trees import Params

Base = RunBase | FileBase

# Differences that an error names.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Taken:
    """What becomes of each parameter of the new run, by path.

    Attributes:
      copied: paths with the same shape in the base.
      resized: path -> function of the base's array.
      fresh: paths of what the new config adds.
      read_as: how resized tables were read whose base does not say how many of their tokens are text.
    """

    copied: tuple[str, ...]
    resized: Mapping[str, Callable[[jax.Array], jax.Array]]
    fresh: tuple[str, ...]
    read_as: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.copied)} arrays copied"]
        for what, names in (("resized", tuple(self.resized)), ("fresh", self.fresh)):
            more = ", ..." if len(names) > _SHOWN else ""
            parts += [f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"] if names else []
        return "; ".join([", ".join(parts), *self.read_as])


def compare(base: Base, there: Flat, here: Flat, config: ConfigDict, model: Model) -> Taken:
    """What becomes of each parameter.

    Args:
      base: what the run begins from.
      there: its parameters by path, arrays or shapes.
      here: those of the new run, likewise.
      config: of the new run.
      model: of the new run.

    Raises:
      UserError: shapes that differ, or parameters that only one of both has, but for what the config adds.
    """
    copied, resized, fresh, wrong, read_as = [], {}, [], [], []
    for path in sorted({*there, *here}):
        if path not in here:
            wrong.append(f"{path} is only there")
        elif path not in there:
            if _is_added(path, base, config):
                fresh.append(path)
            else:
                wrong.append(f"{path} is only here")
        elif there[path].shape == here[path].shape and not _is_extended(path, base, model):
            copied.append(path)
        elif (resize := _resizer(path, base, model, there[path], here[path])) is not None:
            resized[path] = resize
            if base.text_length is None and condition_of(path) is None:
                read_as.append(_read_as(path, there[path].shape[0], model.text_encoder.length))
        else:
            wrong.append(f"{path} is {list(there[path].shape)} there and {list(here[path].shape)} here")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"--from={base.start} does not fit this run: {'; '.join(wrong[:_SHOWN])}{more}; only what the config adds "
            "may be missing there, and only positions may have another shape"
        )
    return Taken(tuple(copied), resized, tuple(fresh), tuple(read_as))


def _read_as(path: str, count: int, text: int) -> str:
    """What a table of a file was taken for: more than one split of its tokens may leave a square."""
    image = count - 1 - text
    side = math.isqrt(image)
    grid = f"{side}x{side}" if side**2 == image else str(image)
    return (
        f"{path} read as {text} tokens of text, as here, and {grid} of the image; if that is wrong, import the "
        "file with its own text length, and begin from that run"
    )


def _is_added(path: str, base: Base, config: ConfigDict) -> bool:
    """Whether a parameter belongs to a condition that the base did not have."""
    name = condition_of(path)
    known = () if base.config is None else tuple(base.config.get("conditions", ConfigDict()))
    return name in config.get("conditions", ConfigDict()) and name not in known


def _is_extended(path: str, base: Base, model: Model) -> bool:
    """Whether a table may hold as many positions as before, but of other tokens."""
    declared = getattr(model.backbone, "RESIZED", {})
    length = base.text_length or model.text_encoder.length
    # Tables of conditions have no text.
    is_whole = path.removeprefix("backbone/") in declared and condition_of(path) is None
    return is_whole and length != model.text_encoder.length


def _resizer(
    path: str, base: Base, model: Model, there: Any, here: Any
) -> Callable[[jax.Array], jax.Array] | None:
    """The function from a parameter of the base to the new run's, None if its shape must stay."""
    place = getattr(model.backbone, "RESIZED", {}).get(path.removeprefix("backbone/"))
    if place is None or there.shape[1:] != here.shape[1:]:
        return None
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)
    length = model.text_encoder.length
    text = (base.text_length or length, length)
    # Tables begin with the time and the text, those of conditions with the image.
    before = (0, 0) if condition_of(path) is not None else (1 + text[0], 1 + text[1])
    image = (there.shape[0] - before[0], here.shape[0] - before[1])

    def resize(value: jax.Array) -> jax.Array:
        resized: jax.Array = function(value, text, image)
        return resized

    found = jax.eval_shape(resize, there)
    return resize if found.shape == here.shape else None


def first_state(
    base: Base, program: StepProgram, state: TrainState, frozen: Params, config: ConfigDict, model: Model
) -> tuple[TrainState, Taken, str]:
    """(the state of step 0 with the base's parameters, what was taken, sha256 of what was taken).

    Args:
      base: what the run begins from.
      program: of the new run.
      state: freshly initialised; it is donated.
      frozen: what `base.frozen` gave, with a text encoder that only the new run trains.
      config: of the new run.
      model: of the new run.

    Raises:
      UserError: as `compare`.
      Damaged, StorageError: the base cannot be read.
    """
    here = {"/".join(path): leaf for path, leaf in trees.by_path(program.state.params).items()}
    there = base.describe(model)
    lent = {
        "/".join(path): leaf
        for path, leaf in trees.by_path(
            {k: v for k, v in frozen.items() if k in program.state.params}
        ).items()
    }
    taken = compare(base, there | lent, here, config, model)
    whole = rules.whole(program.mesh)
    target = {
        path: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=here[path].sharding if path in taken.copied else whole
        )
        for path, leaf in there.items()
    }
    given = base.read(target, model) | lent
    digest = params_hash(given)

    def begin(state: TrainState, given: Flat) -> TrainState:
        params = {}
        for path, leaf in trees.by_path(state.params).items():
            name = "/".join(path)
            value = given.get(name, leaf)
            params[name] = taken.resized.get(name, lambda x: x)(value).astype(leaf.dtype)
        structure = jax.tree.structure(state.params)
        return start_from(state, jax.tree.unflatten(structure, list(params.values())))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    made: TrainState = jax.jit(begin, out_shardings=shardings, donate_argnums=0)(state, given)
    return made, taken, digest


def save(
    workdir: Workdir,
    base: Base,
    config: ConfigDict,
    begun: tuple[TrainState, Taken, str],
    extra: Mapping[str, Any],
) -> None:
    """Writes what was taken from where, then the checkpoint of step 0, and prints one line; all processes call it.

    The record comes first: without a config, it marks a start that was cut short (`unfinished_start`).

    Raises:
      StorageError: the disk or bucket refuses.
    """
    state, taken, digest = begun
    leave_out(workdir)
    changed = {} if base.config is None else stage_configs.changed(base.config, config)
    record = {
        "from": base.start.place,
        "step": base.step,
        "ema": base.ema,
        "params_sha256": digest,
        "copied": list(taken.copied),
        "resized": list(taken.resized),
        "fresh": list(taken.fresh),
        "changed": changed,
    }
    patience = config.checkpoint.retry

    def note() -> None:
        workdir.folder.mkdir(parents=True, exist_ok=True)
        files.write_whole(workdir.start, files.to_json(record).encode())

    if jax.process_index() == 0:
        storage.patiently(note, str(workdir.start), patience)
    processes.barrier()
    with Checkpoints(workdir.checkpoints, verify_first=True, patience=patience) as store:
        store.save(0, state, extra, wait=True)
    if jax.process_index() == 0:
        which = "" if base.step is None else f", step {base.step}, {base.ema or 'raw weights'}"
        differ = stage_configs.in_words(changed, workdir.start.name)
        print(
            f"scaling-dit: began from {base.start.place}{which} (sha256 {digest[:12]}): {taken}{differ}",
            file=sys.stderr,
        )


def leave_out(workdir: Workdir) -> None:
    """Removes what a start that was cut short left; all processes call it."""
    if jax.process_index() == 0 and unfinished_start(workdir) and workdir.checkpoints.exists():
        workdir.checkpoints.rmtree()
    processes.barrier()


def check_same_start(workdir: Workdir, start: Start) -> None:
    """Makes sure that a run that exists began from what the command names; the base itself is not looked for.

    Raises:
      UserError: it began from something else, or from nothing.
    """
    if not workdir.start.exists():
        raise UserError(
            f"{workdir} holds a run that began from nothing, so --from={start} has no part in it; leave --from out to "
            "resume it, or give another --workdir"
        )
    record = files.read_json(workdir.start, dict, "put it back, or leave --from out, to resume the run")
    there = (record.get("from"), record.get("step"))
    if there[0] != start.place or (start.step is not None and there[1] != start.step):
        at = "" if there[1] is None else f"@{there[1]}"
        raise UserError(
            f"the run in {workdir} began from {there[0]}{at}, not from {start}; give another --workdir, or leave "
            "--from out to resume it"
        )
    # As with the step, none given is the run's own.
    if start.ema is not None and plain_name(start.ema) != record.get("ema"):
        raise UserError(
            f"the run in {workdir} began from {_which(record.get('ema'))} of {there[0]}, not from "
            f"{_which(plain_name(start.ema))}; give another --workdir, or leave --from_ema out to resume it"
        )


def _which(ema: str | None) -> str:
    return "the raw weights" if ema is None else f"EMA {ema}"
