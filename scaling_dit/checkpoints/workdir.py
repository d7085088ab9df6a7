"""The folder of a run: where each of its files lies, reading them back, and claiming a folder for a run.

No other module names a file of a run's folder. Layers below get the path of the one file or folder they write.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import encoders, files
from scaling_dit.checkpoints.store import Checkpoints, Damaged
from scaling_dit.data.sources import Source
from scaling_dit.encoders import Tokenizer
from scaling_dit.encoders.subwords import NO_TOKENIZER
from scaling_dit.errors import UserError
from scaling_dit.model.build import make_tokenizer
from scaling_dit.model.frozen import check_frozen
from scaling_dit.monitor import writers

# What `open_workdir` does about a config that is damaged or gone.
REBUILD = "give the `train` command with the --config that the run was started with, which writes it again"


class Workdir(os.PathLike[str]):
    """The folder of a run, local or gs://, and the paths of its files. It stands for a path wherever one is taken.

    Args:
      folder: of the run; it need not exist.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        self.folder = epath.Path(files.expand(folder))
        # The resolved config. It is written last, so a folder that has it is a run.
        self.config = self.folder / "config.json"
        # The tokenizer of the run's text encoder.
        self.tokenizer = self.folder / "tokenizer.json"
        # Where the frozen base of a run that trains adapters lies.
        self.base = self.folder / "base.json"
        # Weights that are not trained and come from no other place.
        self.frozen = self.folder / "frozen.npz"
        # One folder for each saved step.
        self.checkpoints = self.folder / "checkpoints"
        # Snapshots of power averages, from which others are rebuilt.
        self.ema_snapshots = self.folder / "ema_snapshots"
        # Checkpoints that a start found damaged and moved out of the way.
        self.damaged_checkpoints = self.folder / "damaged_checkpoints"
        # Which process writes to the folder, while one does.
        self.lease = self.folder / "lease.json"
        # Empty; written before each save of several processes, to see whether the folder can be written.
        self.writable = self.folder / "writable"
        # Metrics as JSON lines, images as PNG.
        self.metrics = self.folder / "metrics"
        # The same as TensorBoard events, and profiler traces.
        self.tensorboard = self.folder / "tensorboard"
        # Where the time of each start went, as JSON lines.
        self.goodput = self.folder / "goodput"
        # What each process does at the moment: one small file for each.
        self.heartbeats = self.folder / "heartbeats"
        # The rewinds after loss spikes.
        self.rewinds = self.folder / "rewinds.json"
        # Damaged records that were met; other processes than the first add their number to the name.
        self.damaged = self.folder / "damaged.jsonl"
        # Compiled programs, with `config.compile_cache=workdir`.
        self.compile_cache = self.folder / "compile_cache"
        # What a run that began from another's weights took, and where. It is written before its first checkpoint.
        self.start = self.folder / "start.json"
        # The `config.json` that imported weights came with.
        self.imported = self.folder / "diffusers_config.json"
        # A folder for each request of `sample`.
        self.samples = self.folder / "samples"
        # A folder for each request of `evaluate`.
        self.evaluation = self.folder / "evaluation"

    def __fspath__(self) -> str:
        return os.fspath(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Workdir({str(self)!r})"


def read_saved(workdir: epath.PathLike) -> ConfigDict:
    """The config of a run as it was saved, old names replaced. Nothing that it names is imported.

    Raises:
      UserError: the folder holds no run, or its config is damaged.
    """
    path = Workdir(workdir).config
    if not path.exists():
        raise UserError(
            f"no run in {workdir}: {path.name} is missing; --workdir must be a folder that `train` wrote"
        )
    saved = files.read_json(path, dict, f"put it back, or {REBUILD}")
    try:
        return config_lib.from_saved(saved)
    except UserError as error:
        raise UserError(f"{path}: {error}; put the run's own file back, or {REBUILD}") from None


def read_config(
    workdir: epath.PathLike, overrides: Sequence[str] = (), *, own_code: bool = False
) -> ConfigDict:
    """The resolved config of a run; fields of later versions have their defaults, and old names are replaced.

    Args:
      workdir: of the run.
      overrides: as in `config.resolve`.
      own_code: whether code outside of this package that it names may run: parts of a user's own, which may also be a
        stranger's. What the user of this process has named otherwise may run in any case.

    Raises:
      UserError: the folder holds no run, one with fields this version does not know, or one that names such code.
    """
    saved, path = read_saved(workdir), Workdir(workdir).config
    if not own_code:
        config_lib.check_trusted(saved, str(path))
    try:
        return config_lib.resolve(saved, overrides)
    except UserError as error:
        if overrides:
            raise
        raise UserError(f"{path}: {error}") from error


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """All scalars that a run wrote: one dict for each step, ascending, with "step" and each scalar by name.

    Which value stands where several starts wrote one is said at `writers.read_scalars`.
    """
    return writers.read_scalars(Workdir(workdir).metrics)


def load_tokenizer(config: ConfigDict, workdir: epath.PathLike) -> Any:
    """The tokenizer that a run keeps in its workdir.

    Raises:
      UserError: missing or damaged file.
    """
    return encoders.tokenizer_type(config.text_encoder.name).load(Workdir(workdir).tokenizer)


def unfinished_start(workdir: epath.PathLike) -> bool:
    """Whether a start from another run's weights was cut short here before it was one: it has done no step yet.

    A checkpoint beyond step 0 is of a run that has lost its config and metrics, and must stay.
    """
    run = Workdir(workdir)
    if not run.start.exists() or run.config.exists() or run.metrics.exists():
        return False
    saved = run.checkpoints.iterdir() if run.checkpoints.exists() else ()
    return not any(path.name.isdecimal() and int(path.name) for path in saved)


def open_workdir(
    workdir: epath.PathLike,
    config: ConfigDict,
    source: Source | None = None,
    given: Tokenizer | None = None,
) -> Tokenizer:
    """Checks that a workdir is new or holds this run; returns the run's tokenizer. Writes nothing.

    Args:
      workdir: of the run.
      config: of the run, resolved.
      source: the run's, if it is open already; else it is opened where a new tokenizer needs its captions.
      given: the tokenizer of a new run, if it comes from elsewhere.

    Raises:
      UserError: a workdir of another run, checkpoints without a config, or no tokenizer.
    """
    run = Workdir(workdir)
    if run.config.exists() and _is_readable(run):
        config_lib.check_same_run(_read_fixed(run, config), config)
        return load_tokenizer(config, run)
    if not unfinished_start(run) and (run.config.exists() or run.checkpoints.exists()):
        _check_rebuilt(run, config)
        return load_tokenizer(config, run)
    tokenizer = given or make_tokenizer(config, source)
    if tokenizer is None:
        raise UserError(NO_TOKENIZER)
    return tokenizer


def _read_fixed(run: Workdir, config: ConfigDict) -> ConfigDict:
    """The config of a run as far as it must stay: fields that may change between starts have their defaults.

    So a part of a user's own that samples or scores, and is not named any more, need not be found.

    Raises:
      UserError: it names another part of a user's own than `config`, which this start has no reason to import.
    """
    saved = read_saved(run)
    for section in config_lib.FREE_SECTIONS:
        if section in saved:
            del saved[section]
    now = config_lib.own_names(config)
    for key, name in config_lib.own_names(saved).items():
        if now.get(key) != name:
            here = config_lib.flatten(config).get(key)
            raise UserError(
                f"the workdir was written by another experiment: {key} is {name!r} there and {here!r} here; "
                "give another --workdir, or the config it was started with"
            )
    return config_lib.resolve(saved)


def _is_readable(run: Workdir) -> bool:
    try:
        read_saved(run)
    except UserError:
        return False
    return True


def _check_rebuilt(run: Workdir, config: ConfigDict) -> None:
    """Makes sure that a config may take the place of one that is damaged or gone: it is the one in the run's metrics.

    Raises:
      UserError: the metrics do not say what the run was started with, or they say something else.
    """
    what = (
        f"{run.config} is damaged"
        if run.config.exists()
        else f"{run} has checkpoints but no {run.config.name}"
    )
    noted = writers.read_hparams(run.metrics)
    if noted is None:
        raise UserError(
            f"{what}, and no metrics that say what the run was started with; give another --workdir"
        )
    now = writers.plain(config_lib.flatten(config))
    found = config_lib.differences({key: noted[key] for key in now if key in noted}, now)
    if found:
        raise UserError(
            f"{what}; by its metrics it was started with another config: {', '.join(found[:3])}; give that one"
        )
    if jax.process_index() == 0:
        print(
            f"scaling-dit: {what}; it is written again from --config, which its metrics agree with",
            file=sys.stderr,
        )


def tokenizer_hash(workdir: epath.PathLike, tokenizer: Tokenizer) -> str:
    """sha256 of the run's tokenizer file; of what will be written where a new run has none yet.

    Checkpoints hold it, because ids mean nothing to weights that were trained with others.
    """
    run = Workdir(workdir)
    # Without a config, a start that failed half way left it.
    kept = run.config.exists() and run.tokenizer.exists()
    return hashlib.sha256(run.tokenizer.read_bytes() if kept else _tokenizer_file(tokenizer)).hexdigest()


def _tokenizer_file(tokenizer: Tokenizer) -> bytes:
    """The contents of the file that a tokenizer writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        return path.read_bytes()


def check_tokenizer(now: str, saved: Mapping[str, Any], where: str) -> None:
    """Makes sure that trained weights are used with the tokenizer they were trained with.

    Args:
      now: `tokenizer_hash` of the tokenizer at hand.
      saved: the checkpoint's `extra`; those of older versions hold no hash and are taken as they are.
      where: the folder that the error names.

    Raises:
      UserError: the hashes differ.
    """
    then = saved.get("tokenizer_sha256")
    if then is not None and now != then:
        raise UserError(
            f"the checkpoint in {where} was trained with another tokenizer.json (sha256 {then[:12]}, now {now[:12]}); "
            "put that file back, or start a new run"
        )


def check_resumed_weights(workdir: epath.PathLike, frozen_hash: str, tokenizer: str) -> None:
    """Makes sure that a run resumes with the frozen weights and the tokenizer of its newest checkpoint.

    It is checked before the run's config is replaced.

    Args:
      workdir: of the run.
      frozen_hash: of the frozen weights at hand, see `model.frozen`.
      tokenizer: hash of the tokenizer at hand, see `tokenizer_hash`.

    Raises:
      UserError: the checkpoint was trained with others.
    """
    extra = newest_extra(workdir)
    if extra is not None:
        where = str(Workdir(workdir).checkpoints)
        check_frozen(frozen_hash, extra, where)
        check_tokenizer(tokenizer, extra, where)


def newest_extra(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The `extra` of the newest checkpoint of a run that is not damaged, which it resumes from; None without one."""
    folder = Workdir(workdir).checkpoints
    if not folder.exists():
        return None
    with Checkpoints(folder, read_only=True) as store:
        for step in reversed(store.all_steps()):
            try:
                return store.extra(step)
            except Damaged:
                # The run resumes from an older one.
                continue
    return None


def claim_workdir(workdir: epath.PathLike, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Writes a run's tokenizer and config to its workdir; the first process does.

    The tokenizer is written once, and anew where no config says that the one found is a run's. The config is written
    at each start, for some of its sections may change between starts, and last, so that a folder with a config has
    everything else.

    Raises:
      StorageError: the disk or bucket refuses.
    """
    if jax.process_index() != 0:
        return
    run = Workdir(workdir)
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.config.exists() and run.tokenizer.exists()):
        files.write_whole(run.tokenizer, _tokenizer_file(tokenizer))
    files.write_whole(run.config, config_lib.to_json(config).encode())
