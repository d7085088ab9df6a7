"""Finds pretrained weights of frozen encoders: Hugging Face folders, single files and pinned hub ids.

A place is one of

- a folder with `config.json` and safetensors, whole or in shards, as `save_pretrained` writes it,
- the folder of a whole pipeline, of which one part is read (`vae/`, `text_encoder/`),
- one `.safetensors` file, or the index of its shards, with a `config.json` beside it if it has one,
- `hub:ORG/NAME@COMMIT`, if needed with `/FOLDER` or `/FILE` inside it: a snapshot of the Hugging Face hub.

The first three may be local or gs://. Nothing is unpickled.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.files import expand
from scaling_dit.weights import files, state_dicts
from scaling_dit.weights.table import Table

# Values of a `weights` field that name no place.
NONE, RANDOM = "", "random"
_HUB = "hub:"
_HUB_FORM = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]*))?(/(?P<inside>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"
_PIPELINE = "model_index.json"
# Configs and tokenizers.
_SMALL_FILES = ["*.json", "*.txt", "*.model"]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The weights of one encoder and their description.

    Attributes:
      place: the place that the user gave.
      path: the folder or file that the place stands for.
      config: its `config.json`; None for a file without one beside it.
      tensors: upstream name -> array, read at access.
    """

    place: str
    path: epath.Path
    config: dict[str, Any] | None
    tensors: Mapping[str, np.ndarray]

    def load(self, rows: Table, abstract: Mapping[str, Any], what: str) -> dict[str, Any]:
        """The tensors as a tree with the shapes and dtypes of `abstract`, on the host.

        Raises:
          UserError: unknown, missing or misshapen entries, all in one message.
        """
        return state_dicts.load(rows, abstract, self.tensors, f"{what} ({self.place})")

    def check(self, wanted: Mapping[str, Any], section: str = "") -> None:
        """Checks that `config.json`, if there is one, describes the expected architecture.

        Args:
          wanted: key -> the required value, or a tuple of allowed ones. Keys that the file lacks are skipped.
          section: the object of the file that describes this encoder; if the file has none, its top level.

        Raises:
          UserError: the file has another value.
        """
        config = self.config or {}
        described = config.get(section) or config
        for key, value in wanted.items():
            right = value if isinstance(value, tuple) else (value,)
            if key in described and described[key] not in right:
                choices = " or ".join(map(str, right))
                raise UserError(
                    f"{self.place} is of another architecture: {_CONFIG} says {key} {described[key]}, "
                    f"the fields of this encoder mean {choices}"
                )

    def renamed(self, names: Mapping[str, str]) -> "Pretrained":
        """A copy with only the tensors in `names` (new name -> upstream name), still read at access."""
        return dataclasses.replace(self, tensors=state_dicts.Renamed(self.tensors, names))


def is_place(weights: str) -> bool:
    """Whether a `weights` field names a place, not "" (none) or "random" (initialised from the run's seed)."""
    return weights not in (NONE, RANDOM)


def missing(field: str) -> UserError:
    """The error for a run without the weights it needs; `field` is the config field to set."""
    return UserError(
        f"config.{field} is empty, which is enough to count and to plan; to run, set it to a folder or file of "
        f"weights or to hub:ORG/NAME@COMMIT, or to {RANDOM!r} for random weights from the run's seed"
    )


def open_weights(place: str, *, part: str, classes: Sequence[str], field: str) -> Pretrained:
    """Opens the weights of a place without reading a tensor yet.

    Args:
      place: one of the forms above.
      part: the folder of this encoder inside a whole pipeline, such as "vae".
      classes: the class names that `config.json` may state; () allows any.
      field: the config field that holds the place, for errors.

    Raises:
      UserError: no such place, no weights in it, a pickle, a damaged file, another architecture, or a hub id that is
        not pinned or cannot be downloaded.
    """
    path = locate(place, part=part, field=field)
    config = _read_config(path, place, classes, field)
    try:
        return Pretrained(place, path, config, files.open_tensors(path))
    except UserError as error:
        raise UserError(f"config.{field}: {error}") from None


def read_config(place: str, *, part: str, classes: Sequence[str], field: str) -> dict[str, Any] | None:
    """The `config.json` of a place, or None; arguments and errors as in `open_weights`.

    Reads and downloads no weights.
    """
    return _read_config(locate(place, part=part, field=field, weights=False), place, classes, field)


def locate(place: str, *, part: str, field: str, weights: bool = True) -> epath.Path:
    """The folder or file that a place stands for; arguments and errors as in `open_weights`.

    A hub id is downloaded to huggingface_hub's cache, or found there. Without `weights` only its small files are.
    """
    path = _snapshot(place, part, field, weights) if place.startswith(_HUB) else epath.Path(expand(place))
    if not path.exists():
        raise UserError(f"config.{field} is {place!r}: no such file or folder")
    if not path.is_dir() or (path / _CONFIG).exists():
        return path
    inside = path / part
    if inside.is_dir():
        return inside
    if (path / _PIPELINE).exists():
        raise UserError(f"config.{field} is {place!r}, a pipeline without the folder {part!r}")
    return path


def _read_config(path: epath.Path, place: str, classes: Sequence[str], field: str) -> dict[str, Any] | None:
    file = path / _CONFIG if path.is_dir() else path.parent / _CONFIG
    if not file.exists():
        return None
    config = files.read_json(file)
    named = [config["_class_name"]] if config.get("_class_name") else config.get("architectures") or []
    if classes and named and not set(map(str, named)) & set(classes):
        right = " or ".join(classes)
        raise UserError(f"config.{field} is {place!r}, which holds a {named[0]}; it must hold a {right}")
    return config


def _snapshot(place: str, part: str, field: str, weights: bool) -> epath.Path:
    """The local copy of a hub id: its small files, then the weights of one folder."""
    repo, revision, inside = _parse_hub(place, field)
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"config.{field} is {place!r}, which needs huggingface_hub: pip install 'scaling-dit[text]'"
        ) from None

    def download(patterns: list[str], ignored: list[str] | None = None) -> epath.Path:
        try:
            return epath.Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
                )
            )
        # The network, the hub, or a cache without the files can fail in many ways.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"config.{field} is {place!r}, which cannot be had: {reason}") from error

    root = download(_SMALL_FILES)
    path = root / inside if inside else root
    if weights and inside.endswith(files.SUFFIX):
        download([inside])
    elif weights:
        nested = not (path / _CONFIG).exists() and (path / part).is_dir()
        folder = "/".join(name for name in (inside, part if nested else "") if name)
        start = f"{folder}/" if folder else ""
        # Patterns match across folders, so files of folders below this one are excluded explicitly.
        download([f"{start}*{files.SUFFIX}"], [f"{start}*/*{files.SUFFIX}"])
    elif inside.endswith(files.SUFFIX):
        # The file itself is not downloaded yet, but a config.json may lie beside it.
        return path.parent
    return path


def _parse_hub(place: str, field: str) -> tuple[str, str, str]:
    """(ORG/NAME, commit, path inside) of a hub id."""
    form = _HUB_FORM.fullmatch(place.removeprefix(_HUB))
    if form is None:
        raise UserError(
            f"config.{field} is {place!r}; a hub id is hub:ORG/NAME@COMMIT or hub:ORG/NAME@COMMIT/FOLDER"
        )
    revision = form["revision"] or ""
    if not _COMMIT.fullmatch(revision):
        raise UserError(
            f"config.{field} is {place!r}; pin it: after @ comes the 40-digit commit of its files, for branches and "
            "tags can move"
        )
    return form["repo"], revision, form["inside"] or ""
