"""What a new run can begin from: a checkpoint of another run, or a safetensors file of a backbone.

A base is asked in this order: what it is (its config and its tokenizer), which arrays it has, as shapes, and then the
arrays, in the shardings of the new run. So nothing lies whole on one host that is split over the mesh.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit import files, trees
from scaling_dit.backbones import contract
from scaling_dit.backbones.state_dicts import held_conditions, load_state_dict
from scaling_dit.checkpoints import posthoc_ema
from scaling_dit.checkpoints.ema import find_ema, kept_emas, power_names
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import (
    Workdir,
    check_tokenizer,
    load_tokenizer,
    read_saved,
    tokenizer_hash,
)
from scaling_dit.encoders import Tokenizer
from scaling_dit.errors import UserError
from scaling_dit.model.frozen import check_frozen, frozen_hash, open_frozen, open_trained
from scaling_dit.model.model import Model
from scaling_dit.trees import Params
from scaling_dit.weights import files as weight_files

# Path of a parameter, "backbone/pos_embed" -> its shape and dtype, or the array.
Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Start:
    """What a new run begins from, as a user names it.

    Attributes:
      place: absolute; folder of a run, or a safetensors file, an index of its shards, or a folder with one.
      step: of the checkpoint; None for the newest.
      ema: the average to begin from, as `pipeline.load` takes it; None for the raw weights.
      own_code: whether code outside of this package that a run's config names may run (`workdir.read_config`).
    """

    place: str
    step: int | None = None
    ema: float | str | None = None
    own_code: bool = False

    @classmethod
    def parse(cls, text: epath.PathLike, ema: float | str | None = None, *, own_code: bool = False) -> Self:
        """From "RUN", "RUN@STEP" or "FILE".

        Raises:
          UserError: no path.
        """
        place, step = files.expand(text).rstrip("/"), None
        head, at, tail = place.rpartition("@")
        remote = files.is_remote(place)
        # The name of a local folder may end so.
        if at and tail.isdecimal() and (remote or not epath.Path(place).exists()):
            place, step = head.rstrip("/"), int(tail)
        if not remote:
            # A later start may be given in another folder.
            place = os.path.abspath(place)
        return cls(place, step, None if ema in (None, "none", 0, "0") else ema, own_code)

    def __str__(self) -> str:
        return self.place if self.step is None else f"{self.place}@{self.step}"


def open_base(start: Start) -> "RunBase | FileBase":
    """The base that a user names; no array is read.

    Raises:
      UserError: nothing lies there, a run without such a checkpoint or average, or a step or average of a file.
    """
    path = epath.Path(start.place)
    if Workdir(path).config.exists():
        return RunBase.open(start)
    if path.is_dir() and Workdir(path).checkpoints.exists():
        raise UserError(
            f"--from={start}: {path} has checkpoints but no {Workdir(path).config.name}; put that file back, or give "
            "another run"
        )
    if start.step is not None or start.ema is not None:
        what = f"step {start.step}" if start.step is not None else f"EMA {start.ema}"
        raise UserError(f"--from={start}: {path} is no run's folder, so it has no {what}; leave that out")
    if not path.exists():
        raise UserError(f"--from={start}: no run and no file there")
    return FileBase(start, weight_files.open_tensors(path))


@dataclasses.dataclass(frozen=True)
class RunBase:
    """A checkpoint of another run.

    Attributes:
      start: what the user named.
      config: of that run, without what may change between starts.
      step: of the checkpoint.
      ema: name of the average, None for the raw weights.
      saved: the checkpoint's `extra`.
      stored: its parameters as shapes and dtypes.
    """

    start: Start
    config: ConfigDict
    step: int
    ema: str | None
    saved: Mapping[str, Any]
    stored: Params

    @classmethod
    def open(cls, start: Start) -> Self:
        """As `open_base`."""
        run = Workdir(start.place)
        config = read_fixed(run, own_code=start.own_code)
        name = find_ema(config, start.ema)
        with Checkpoints(run.checkpoints, read_only=True) as store:
            step = start.step if start.step is not None else store.latest_step()
            kept = None if name not in kept_emas(config) else name
            stored, saved = store.describe_params(step, ema=kept), store.extra(step or 0)
        return cls(start, config, int(step or 0), name, saved, stored)

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder is among its parameters."""
        return "text_encoder" in self.stored

    @property
    def text_length(self) -> int | None:
        """Tokens of its captions; None where its text encoder has no such field."""
        found: int | None = self.config.text_encoder.get("length")
        return found

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, which the new run keeps.

        Raises:
          UserError: it is missing, or not the one that the checkpoint was trained with.
        """
        run = Workdir(self.start.place)
        tokenizer: Tokenizer = load_tokenizer(self.config, run)
        check_tokenizer(tokenizer_hash(run, tokenizer), self.saved, str(run))
        return tokenizer

    def frozen(self, model: Model, seed: int, mesh: Mesh, boxed: Params, boxed_params: Params) -> Params:
        """Its frozen weights, among them those of a text encoder that the new run trains; see `open_frozen`.

        Args:
          model: of the new run.
          seed: of the new run; nothing is drawn from it here.
          mesh: to lie on.
          boxed: frozen weights of the new run.
          boxed_params: parameters of the new run.

        Raises:
          UserError: they are not those that the checkpoint was trained with.
        """
        if not self.trains_text:
            boxed = boxed | {"text_encoder": (boxed | boxed_params)["text_encoder"]}
        frozen = open_frozen(Workdir(self.start.place).frozen, model, seed, mesh, boxed)
        check_frozen(frozen_hash(frozen, *model.encoders), self.saved, self.start.place)
        return frozen

    def describe(self, model: Model) -> Flat:
        """Its parameters, and a frozen text encoder that the new run trains, as shapes and dtypes."""
        del model
        return {"/".join(path): leaf for path, leaf in trees.by_path(self.stored).items()}

    def read(self, target: Flat, model: Model) -> Flat:
        """Its parameters in the shardings of `target`, which holds all that `describe` gave.

        Raises:
          UserError: the average cannot be rebuilt.
          Damaged, StorageError: they cannot be read.
        """
        del model
        run, nested = Workdir(self.start.place), _nested(target)
        rebuilt = self.ema is not None and self.ema not in kept_emas(self.config)
        with Checkpoints(run.checkpoints, read_only=True) as store:
            params, _ = store.restore_params(self.step, nested, ema=None if rebuilt else self.ema)
            if rebuilt:
                wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
                names = power_names(self.config)
                params = posthoc_ema.rebuild(run.ema_snapshots, store, self.step, wide, str(self.ema), names)
        return {"/".join(path): leaf for path, leaf in trees.by_path(params).items()}


@dataclasses.dataclass
class FileBase:
    """Weights of a backbone in a safetensors file, under the names of the published code or of diffusers.

    They are read on every host, as `import` does.
    """

    start: Start
    tensors: Mapping[str, Any]
    loaded: Flat = dataclasses.field(default_factory=dict, repr=False)
    # What a run's base has and a file has not.
    config: None = None
    step: None = None
    ema: None = None
    trains_text: bool = False
    text_length: None = None

    def tokenizer(self) -> None:
        """None: the new run finds or makes its own."""

    def frozen(self, model: Model, seed: int, mesh: Mesh, boxed: Params, boxed_params: Params) -> Params:
        """The new run's frozen weights, and a pretrained text encoder that it trains.

        Raises:
          UserError: a text encoder that has no weights to begin from.
        """
        frozen = open_frozen(None, model, seed, mesh, boxed)
        trained = {name: boxed_params[name] for name in boxed_params if name != "backbone"}
        given = open_trained(model, mesh, trained)
        if missing := sorted(set(trained) - set(given)):
            raise UserError(
                f"--from={self.start} holds a backbone alone, and config.{missing[0]} has no weights to begin from; "
                f"set config.{missing[0]}.weights, or begin from a run's folder"
            )
        return frozen | given

    def describe(self, model: Model) -> Flat:
        """The parameters of the backbone as shapes and dtypes.

        Raises:
          UserError: entries that do not fit the backbone, all in one line.
        """
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self._arrays(model).items()}

    def read(self, target: Flat, model: Model) -> Flat:
        """The parameters in the shardings of `target`; each process sends its own devices their parts."""
        return {
            name: jax.make_array_from_callback(array.shape, target[name].sharding, array.__getitem__)
            for name, array in self._arrays(model).items()
        }

    def _arrays(self, model: Model) -> Flat:
        if self.loaded:
            return self.loaded
        backbone: Any = model.backbone
        text = (model.text_encoder.length, model.text_encoder.dim)
        inputs = contract.example_inputs(backbone, model.latent_shape, text)
        held = held_conditions(backbone, self.tensors, inputs=inputs)
        if held != tuple(getattr(backbone, "conditions", ())):
            # The others are new, and begin as they are initialised.
            backbone = backbone.clone(conditions=held)
            inputs = contract.example_inputs(backbone, model.latent_shape, text)
        loaded = load_state_dict(backbone, self.tensors, inputs=inputs)["params"]
        self.loaded = {"/".join(("backbone", *path)): leaf for path, leaf in trees.by_path(loaded).items()}
        return self.loaded


def read_fixed(run: Workdir, *, own_code: bool) -> ConfigDict:
    """The resolved config of a run, in which fields that may change between starts have their defaults.

    Raises:
      UserError: a damaged config, or one that names code that the user of this process has not named.
    """
    saved = read_saved(run)
    for section in config_lib.FREE_SECTIONS:
        if section in saved:
            del saved[section]
    if not own_code:
        config_lib.check_trusted(saved, str(run.config))
    try:
        return config_lib.resolve(saved)
    except UserError as error:
        raise UserError(f"{run.config}: {error}") from error


def _nested(flat: Flat) -> Params:
    nested: Params = {}
    for name, leaf in flat.items():
        *above, last = name.split("/")
        node = nested
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested
