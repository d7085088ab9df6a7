"""A new run from published weights: the `import` verb.

The run is as `train` would start it, at step 0 with a fresh optimizer, but that the backbone's parameters and all
averages are the imported ones. `train` with the same config resumes from there, and every verb opens it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit import backbones, interop, trees
from scaling_dit import config as config_lib
from scaling_dit.backbones.conditions_weights import input_channels
from scaling_dit.checkpoints.lease import leased
from scaling_dit.checkpoints.state import TrainState, init_state, start_from
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import (
    Workdir,
    claim_workdir,
    load_tokenizer,
    open_workdir,
    tokenizer_hash,
)
from scaling_dit.errors import UserError
from scaling_dit.files import write_whole
from scaling_dit.interop.diffusers import lora, pipelines
from scaling_dit.interop.diffusers.config import check_same, family_of, read_fields
from scaling_dit.interop.exporting import model_inputs
from scaling_dit.model.adapters import Adapters
from scaling_dit.model.build import build_model, open_source
from scaling_dit.model.frozen import frozen_hash, open_frozen, open_trained, save_frozen
from scaling_dit.model.model import Model
from scaling_dit.parallel import rules
from scaling_dit.training import optim
from scaling_dit.training.base import Start
from scaling_dit.training.program import run_mesh
from scaling_dit.training.start import Run, take
from scaling_dit.weights import files

# Fields that the codec and the text encoder of the run decide, and what to set.
_FROM_RUN = {
    "in_channels": (
        "config.codec.name, and config.conditioning.names for the image conditions of an inpainting or editing UNet"
    ),
    "text_dim": "config.text_encoder.dim",
}


def main(source: str, workdir: str, spec: str, overrides: Sequence[str] = (), base: str | None = None) -> int:
    """The `import` verb: reads weights, writes a run at step 0 and says where; returns the exit code.

    Args:
      source: a safetensors file, an index of shards, or a folder with one of these. A `config.json` of diffusers in
        the folder decides the fields of the backbone. The folder of a whole pipeline also decides codec, text encoder
        and noise schedule; the run reads its autoencoder and text encoder from there.
      workdir: folder of the new run; it must hold none.
      spec: experiment that the run belongs to, as in `config.load`.
      overrides: arguments such as `--config.batch=8`.
      base: for a file of adapters, the run whose parameters they are added to.

    Raises:
      UserError: a workdir that holds a run, files that are no safetensors, weights that do not fit the backbone, or a
        config that contradicts the folder's.
    """
    path, folder = epath.Path(source), Workdir(workdir)
    for taken in (folder.config, folder.checkpoints):
        if taken.exists():
            raise UserError(f"{folder} holds a run already; give another --workdir")
    experiment = config_lib.read_experiment(spec).copy_and_resolve_references()
    if lora.is_adapter(path):
        return import_adapters(path, folder, experiment, overrides, base)
    if base is not None:
        raise UserError(f"--base is for a file of adapters, and {source} holds none; leave it out")
    pipelines.check_latents(path)
    if pipelines.is_pipeline(path):
        chosen = "sample.sampler" in map(config_lib.override_key, overrides)
        pipelines.set_components(experiment, path, sampling=not chosen)
        path = pipelines.backbone_folder(path)
    described = read_described(path)
    config = run_config(experiment, overrides, described, source)
    if config.adapter.rank:
        raise UserError(
            f"config.adapter.rank is {config.adapter.rank}, but {source} holds whole parameters; import them with "
            "rank 0, and train adapters beside that run by `train --from`"
        )
    weights = files.read(path)
    start_run(config, folder, weights, described, source)
    print(
        f"{config.backbone.name} with {len(weights)} entries of {source} in {folder}, at step 0; `train` resumes it"
    )
    return 0


def import_adapters(
    path: epath.Path, folder: Workdir, experiment: ConfigDict, overrides: Sequence[str], base: str | None
) -> int:
    """A new run at step 0 whose adapters are those of a file, beside the parameters of another run.

    Its `config.adapter` follows from the file; the scale of the file is in the adapters, so alpha is the rank.

    Raises:
      UserError: no base, a field of `config.adapter` that an override sets, or adapters of another model.
    """
    if base is None:
        raise UserError(
            f"{path} holds adapters; name the run whose parameters they are added to by --base=WORKDIR"
        )
    by_hand = [one for one in overrides if config_lib.override_key(one).startswith("adapter.")]
    if by_hand:
        raise UserError(f"{by_hand[0]}: it follows from {path}; leave it out")
    read = lora.read_file(path)
    config = config_lib.resolve(experiment, overrides)
    tokenizer = load_tokenizer(config, Workdir(base))
    model = build_model(config, tokenizer)
    backbone: Any = model.backbone
    inputs = model_inputs(model)
    config.adapter.update({"rank": read.rank, "alpha": 0.0, "targets": lora.targets(backbone, read, inputs)})
    # Before the folder is claimed: what does not fit leaves no trace.
    key = jax.random.key(config.seed)
    adapters = Adapters.of(config, model.shapes()[0])
    assert adapters is not None
    forms = {kernel[1:]: form for kernel, form in adapters.forms.items()}
    fresh = jax.tree.map(np.asarray, trees.unbox(jax.jit(adapters.init)(key)))["backbone"]
    loaded = {"backbone": lora.load(backbone, read, forms, fresh, inputs)}

    def save(run: Run) -> None:
        state = run.fresh_state()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.program.state)
        given = jax.tree.map(jax.device_put, loaded, shardings.params)
        start = jax.jit(start_from, out_shardings=shardings, donate_argnums=0)(state, given)
        with Checkpoints(folder.checkpoints, verify_first=True, patience=config.checkpoint.retry) as store:
            store.save(0, start, run.held(), wait=True)

    with leased(folder.lease, str(folder)) as lease:
        Run.open(config, folder, lease=lease, start=Start.parse(base), first=save)
    print(
        f"adapters of rank {read.rank} for {len(read.modules)} modules in {folder}, at step 0; `train` resumes it"
    )
    return 0


def read_described(path: epath.Path) -> dict[str, Any] | None:
    """The `config.json` of a diffusers folder; None for a file, or for a folder that holds none."""
    file = path / "config.json"
    return files.read_json(file) if path.is_dir() and file.exists() else None


def run_config(
    config: ConfigDict, overrides: Sequence[str], described: Mapping[str, Any] | None, source: str
) -> ConfigDict:
    """The config of the new run: the experiment's, its backbone filled from a diffusers folder if there is one.

    Args:
      config: of the experiment; its backbone is replaced in place if an override names another.
      overrides: arguments such as `--config.batch=8`.
      described: the folder's `config.json`.
      source: what the user gave, for errors.

    Raises:
      UserError: a backbone, or a field of it, that the experiment or an override sets to something else than the
        folder.
    """
    if described is None:
        return config_lib.resolve(config, overrides)
    there = config.get("backbone", ConfigDict()).get("name", config_lib.defaults().backbone.name)
    name = config_lib.component_names(overrides, ("backbone",)).get("backbone", there)
    needed, family = family_of(described, source, configured=name)
    if name != needed:
        raise UserError(
            f"config.backbone.name is {name!r}, but {source} holds a {family.class_name}; add "
            f"--config.backbone.name={needed}"
        )
    if there != name:
        # Another backbone's sizes are not this one's.
        config.backbone = ConfigDict({"name": name})
    section = config.get("backbone", ConfigDict({"name": name}))
    by_hand = {field for field, value in section.items() if value is not None}
    by_hand |= {
        field
        for component, _, field in (config_lib.override_key(one).partition(".") for one in overrides)
        if component == "backbone"
    }
    fields = read_fields(family, described, source)
    fields = {field: value for field, value in fields.items() if field not in _FROM_RUN}
    _fill(section, backbones.backbone_fields(name), fields, by_hand)
    config.backbone = section
    resolved = config_lib.resolve(config, overrides)
    _check_by_hand(resolved.backbone, fields, by_hand, source)
    return resolved


def _fill(
    section: ConfigDict, defaults: Mapping[str, Any], fields: Mapping[str, Any], by_hand: set[str]
) -> None:
    """Sets in place the backbone's fields that were not set by hand.

    Fields that a size set by hand stands for stay unset; they are compared once the backbone is built.
    """
    by_size = "size" in by_hand
    for field, value in fields.items():
        if field not in by_hand and not (by_size and defaults.get(field) is None):
            section[field] = value
    if "size" in defaults and not by_size:
        # A default, which the fields replace.
        section.size = None


def _check_by_hand(section: ConfigDict, fields: Mapping[str, Any], by_hand: set[str], source: str) -> None:
    """Makes sure that the fields that were set by hand agree with the folder's."""
    for field, value in fields.items():
        now = section[field]
        if field in by_hand and now is not None and now != value:
            raise UserError(
                f"config.backbone.{field} is {now!r}, but {source} has {value!r}; leave it out, for it follows from "
                "there"
            )


def start_run(
    config: ConfigDict,
    workdir: Workdir,
    weights: Mapping[str, np.ndarray],
    described: Mapping[str, Any] | None,
    origin: str,
) -> None:
    """Writes a run at step 0 whose backbone has these weights, in upstream names.

    The config is written last: a folder with a config has everything else.
    """
    mesh, fresh = run_mesh(config), not workdir.config.exists()
    source = open_source(config)
    tokenizer = open_workdir(workdir, config, source)
    model = build_model(config, tokenizer, source)
    if described is not None:
        _check_described(config, model, described, origin)
    backbone: Any = model.backbone
    loaded = interop.load_state_dict(backbone, weights, inputs=model_inputs(model))["params"]
    key = jax.random.key(config.seed)
    boxed, boxed_frozen = model.shapes()
    _check_shapes(trees.by_path(loaded), trees.by_path(trees.unbox(boxed["backbone"])), model)

    frozen = open_frozen(None if fresh else workdir.frozen, model, config.seed, mesh, boxed_frozen)
    placed = rules.param_shardings(mesh, boxed)
    optimizer = optim.make_optimizer(config.optim, config.steps)

    # Traced once, for its shapes and for what is compiled.
    @functools.partial(jax.jit, inline=True)
    def make(imported: Any) -> TrainState:
        # What is given of the fresh state is never computed.
        return start_from(init_state(model, optimizer, config, key), imported)

    host = jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
        loaded,
        placed["backbone"],
    )
    given = {"backbone": host, **open_trained(model, mesh, boxed)}
    shardings = rules.state_shardings(mesh, jax.eval_shape(make, given), placed)
    start = jax.jit(make, out_shardings=shardings)(given)
    hashes = {
        "frozen_sha256": frozen_hash(frozen, *model.encoders),
        "tokenizer_sha256": tokenizer_hash(workdir, tokenizer),
    }
    with leased(workdir.lease, str(workdir)) as lease:
        take(lease, workdir, fresh)
        with Checkpoints(workdir.checkpoints, verify_first=True, patience=config.checkpoint.retry) as store:
            store.save(0, start, hashes, wait=True)
        if described is not None and jax.process_index() == 0:
            write_whole(workdir.imported, (json.dumps(described, indent=2) + "\n").encode())
        save_frozen(workdir.frozen, model, frozen, replace=fresh)
        claim_workdir(workdir, config, tokenizer)


def _check_described(config: ConfigDict, model: Model, described: Mapping[str, Any], source: str) -> None:
    name, family = family_of(described, source, configured=config.backbone.name)
    backbone: Any = model.backbone
    fields = read_fields(family, described, source)
    given = {"in_channels": input_channels(backbone), "text_dim": backbone.text_dim}
    for field, setting in _FROM_RUN.items():
        if given[field] != fields[field]:
            raise UserError(
                f"{source} has {field} {fields[field]}, but this run gives {given[field]}; set {setting}"
            )
    check_same(name, family, described, backbone, model.latent_shape[:2], source)


def _check_shapes(found: Mapping[Any, Any], wanted: Mapping[Any, Any], model: Model) -> None:
    """A table of positions may have any length in a state dict, but it must fit this run's inputs."""
    for path, target in wanted.items():
        if found[path].shape != target.shape:
            raise UserError(
                f"{'/'.join(path)} of the weights is {found[path].shape}, but latents of {model.latent_shape} and "
                f"{model.text_encoder.length} tokens of text need {target.shape}: import at the size it was made for"
            )
