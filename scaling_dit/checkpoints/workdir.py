"""The folder of a run: the names of its files, reading its config, and making a folder this run's."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import encoders, files
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.data.sources import Source
from scaling_dit.encoders import Tokenizer
from scaling_dit.encoders.subwords import NO_TOKENIZER
from scaling_dit.errors import UserError
from scaling_dit.model import frozen as frozen_weights
from scaling_dit.model.build import make_tokenizer

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"


def read_config(workdir: str | epath.Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The resolved config of a run; fields of later versions have their defaults, and old names are replaced.

    Args:
      overrides: as in `config.resolve`.

    Raises:
      UserError: the folder holds no run, or one with fields this version does not know.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise UserError(
            f"no run in {workdir}: {CONFIG_FILE} is missing; --workdir must be a folder that `train` wrote"
        )
    return config_lib.resolve(config_lib.from_json(path.read_text()), overrides)


def load_tokenizer(config: ConfigDict, workdir: epath.Path) -> Any:
    """The tokenizer that a run keeps in its workdir.

    Raises:
      UserError: missing or damaged file.
    """
    return encoders.tokenizer_type(config.text_encoder.name).load(workdir / TOKENIZER_FILE)


def open_workdir(workdir: epath.Path, config: ConfigDict, source: Source | None = None) -> Tokenizer:
    """Checks that a workdir is new or holds this run; returns the run's tokenizer. Writes nothing.

    Where a new run's tokenizer is built from `source`, that is opened here unless it is given.

    Raises:
      UserError: a workdir of another run, checkpoints without a config, or no tokenizer.
    """
    if (workdir / CONFIG_FILE).exists():
        config_lib.check_same_run(read_config(workdir), config)
        return load_tokenizer(config, workdir)
    if (workdir / CHECKPOINTS).exists():
        raise UserError(f"{workdir} has checkpoints but no {CONFIG_FILE}; give another --workdir")
    tokenizer = make_tokenizer(config, source)
    if tokenizer is None:
        raise UserError(NO_TOKENIZER)
    return tokenizer


def check_kept(workdir: epath.Path, frozen_hash: str) -> None:
    """Makes sure that a run goes on with the frozen weights of its newest checkpoint, before its config is replaced.

    Raises:
      UserError: they are others.
    """
    if not (workdir / CHECKPOINTS).exists():
        return
    with Checkpoints(workdir / CHECKPOINTS, read_only=True) as store:
        step = store.latest_step()
        if step is not None:
            frozen_weights.check_frozen(frozen_hash, store.extra(step), str(store.directory))


def claim_workdir(workdir: epath.Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Makes a workdir this run's: tokenizer and config; what is there stays, but for the config.

    The config is written last, so a folder with a config has everything else, and anew at each start, for some of its
    sections may change between starts.
    """
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / TOKENIZER_FILE).exists():
        tokenizer.save(workdir / TOKENIZER_FILE)
    files.write_whole(workdir / CONFIG_FILE, config_lib.to_json(config).encode())
