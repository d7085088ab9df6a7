"""Weights of a run to a folder that other code reads: the `export` verb."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from scaling_dit import interop
from scaling_dit.backbones import contract
from scaling_dit.backbones.declared import diffusers_class
from scaling_dit.checkpoints.ema import find_ema
from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.errors import UserError
from scaling_dit.files import is_remote
from scaling_dit.interop.diffusers import lora, pipelines
from scaling_dit.interop.diffusers.config import keep_spelling, write_config
from scaling_dit.model.adapters import Adapters
from scaling_dit.model.model import Model
from scaling_dit.sampling import pipeline
from scaling_dit.sampling.pipeline import Pipeline
from scaling_dit.weights.files import SHARD_BYTES, STEMS, read_json, write

PIPELINE = "diffusers-pipeline"
_CONFIG = "config.json"


def main(
    workdir: str,
    out: str,
    *,
    to: str,
    step: int | None = None,
    ema: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    own_code: bool = False,
    adapter: bool = False,
) -> int:
    """The `export` verb: writes the backbone of a run, or all of it, and says where; returns the exit code.

    Args:
      workdir: folder of the run.
      out: folder to write; it must not exist or be empty.
      to: "diffusers" (config.json and diffusion_pytorch_model.safetensors, for `from_pretrained`), "safetensors"
        (model.safetensors, in the names of the published code), or "diffusers-pipeline" (the whole run, see
        `pipelines.py`).
      step: checkpoint; the latest by default.
      ema: average to write, as in `pipeline.load`, "none" for the raw weights; `config.sample.ema` by default.
      shard_bytes: weights beyond this are split over several files.
      own_code: as in `workdir.read_config`.
      adapter: write the adapters of a run that trains these, alone; without it they are added to their base.

    Raises:
      UserError: no such run, checkpoint or average; a folder that holds something or cannot be renamed; or a backbone
        without names elsewhere.
    """
    folder = epath.Path(out)
    # The folder is written beside its place and renamed.
    if folder.name in ("", ".."):
        raise UserError(
            f"--out={out} names no folder of its own; give a new one, such as --out={folder / 'export'}"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; give another --out, or delete it first")
    config = read_config(workdir, own_code=own_code)
    if adapter and not config.adapter.rank:
        raise UserError(f"{workdir} trains no adapters (config.adapter.rank is 0); leave --adapter out")
    decay = find_ema(config, config.sample.ema if ema is None else ema)
    pipe = pipeline.open_run(config, workdir, step, decay)
    if adapter:
        return export_adapters(pipe, folder, decay)
    if to == PIPELINE:
        pipelines.kind_of(pipe)
    described = None if to == "safetensors" else describe(pipe, epath.Path(workdir))
    backbone: Any = pipe.model.backbone
    inputs = model_inputs(pipe.model)
    weights = interop.to_state_dict(backbone, {"params": pipe.params["backbone"]}, inputs=inputs)
    if jax.process_index() == 0:
        with whole_folder(folder) as partial:
            if described is not None and to == PIPELINE:
                pipelines.write(partial, pipe, weights, described, shard_bytes)
                files = [pipelines.INDEX, "and the folders it names"]
            else:
                files = write_backbone(partial, weights, described, shard_bytes)
        total = sum(array.nbytes for array in weights.values())
        about = f"step {pipe.step}, ema {decay or 'none'}, {total / 1e6:,.1f} MB"
        print(f"{config.backbone.name} in {folder}: {', '.join(files)} ({about})")
    return 0


def export_adapters(pipe: Pipeline, folder: epath.Path, decay: str | None) -> int:
    """Writes the adapters of a run as diffusers' pipelines load them.

    Raises:
      UserError: adapters outside of the backbone, or a backbone without names elsewhere.
    """
    assert pipe.adapters is not None
    others = set(pipe.adapters) - {"backbone"}
    if others:
        raise UserError(f"the run has adapters of {', '.join(others)} too, which the file has no place for")
    boxed = pipe.model.shapes()[0]
    chosen = Adapters.of(pipe.config, boxed)
    assert chosen is not None
    forms = {path[1:]: form for path, form in chosen.forms.items()}
    backbone: Any = pipe.model.backbone
    arrays = lora.save(backbone, pipe.adapters["backbone"], forms, chosen.scale, model_inputs(pipe.model))
    if jax.process_index() == 0:
        with whole_folder(folder) as partial:
            name = lora.write(partial, arrays)
        total = sum(array.nbytes for array in arrays.values())
        about = f"step {pipe.step}, ema {decay or 'none'}, rank {chosen.rank}, {total / 1e6:,.1f} MB"
        print(f"adapters of {pipe.config.backbone.name} in {folder}: {name} ({about})")
    return 0


def model_inputs(model: Model) -> tuple[Any, ...]:
    """Abstract inputs of one call of a run's backbone."""
    backbone: Any = model.backbone
    text = (model.text_encoder.length, model.text_encoder.dim)
    return contract.example_inputs(backbone, model.latent_shape, text)


def describe(pipe: Pipeline, workdir: epath.Path) -> dict[str, Any]:
    """The `config.json` of a run's backbone; one that was imported keeps the spelling of the file it came with."""
    name = pipe.config.backbone.name
    described = write_config(name, pipe.model.backbone, pipe.model.latent_shape[:2])
    imported = Workdir(workdir).imported
    family = diffusers_class(type(pipe.model.backbone))
    if family is None or not imported.exists():
        return described
    return keep_spelling(family, described, read_json(imported))


@contextlib.contextmanager
def whole_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """A folder to write to, which appears as `folder` only when the block has ended without an error.

    A remote store cannot rename: there the file that every reader opens first should be written last.
    """
    remote = is_remote(folder)
    partial = folder if remote else folder.with_name(folder.name + ".partial")
    if not remote and partial.exists():
        # Of an export that was killed.
        partial.rmtree()
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    if not remote:
        if folder.exists():
            # Empty, as was checked.
            folder.rmdir()
        partial.rename(folder)


def write_backbone(
    folder: epath.Path, weights: dict[str, np.ndarray], described: dict[str, Any] | None, shard_bytes: int
) -> list[str]:
    """Writes weights and, if there is one, config.json; returns the names of the files."""
    stem = STEMS[1 if described is None else 0]
    files = write(folder, stem, weights, shard_bytes)
    if described is not None:
        (folder / _CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
        files.append(_CONFIG)
    return files
