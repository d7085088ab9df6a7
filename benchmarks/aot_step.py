"""Compiles the train step of a backbone for an unattached TPU slice, and prints the compiler's numbers.

    python benchmarks/aot_step.py --backbone=unet --size=sdxl --topology=v5p:4x4x4 --gather-once --set remat=products
    python benchmarks/aot_step.py --backbone=uvit --size=h2048-d42-n16 --topology=v5e:16x16 --set remat=full
    python benchmarks/aot_step.py --table benchmarks/aot/*.json      # several steps as a markdown table

The step is training's own (`training.step.make_train_step`) on precomputed latents and text embeddings: noise, forward,
loss, gradients, AdamW with clipping and the guard against NaN, and averages. Needs `libtpu` from PyPI, but no TPU.
"""

import argparse
import ast
import dataclasses
import datetime
import functools
import gzip
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from scaling_dit import backbones  # noqa: E402
from scaling_dit import config as config_lib  # noqa: E402
from scaling_dit.checkpoints.state import init_state  # noqa: E402
from scaling_dit.costs.count import count  # noqa: E402
from scaling_dit.diffusion import schedules  # noqa: E402
from scaling_dit.model.model import Model  # noqa: E402
from scaling_dit.parallel import fsdp, rules, xla_flags  # noqa: E402
from scaling_dit.parallel import topologies as slices  # noqa: E402
from scaling_dit.parallel.mesh import make_mesh  # noqa: E402
from scaling_dit.planning import hlo_cost, hlo_timeline  # noqa: E402
from scaling_dit.planning.hlo import Program, compiled_text  # noqa: E402
from scaling_dit.planning.roofline import roofline  # noqa: E402
from scaling_dit.training import optim  # noqa: E402
from scaling_dit.training.step import make_train_step  # noqa: E402

# 256 px through an 8x autoencoder, and CLIP-H text.
LATENTS, TEXT = (32, 32, 4), (77, 1024)


@dataclasses.dataclass(frozen=True)
class Latents:
    """A codec for precomputed latents [B, 32, 32, 4], which it returns unchanged."""

    channels = LATENTS[-1]

    def shape(self, image_size: int) -> tuple[int, ...]:
        """The shape of a latent, for any image size."""
        return LATENTS

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """No weights."""
        return {}

    def encode(self, params: Any, images: jax.Array, rng: jax.Array) -> jax.Array:
        """The latents themselves, float32."""
        return images.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A text encoder for precomputed embeddings, which it takes as ids [B, L * D] bfloat16."""

    length, dim = TEXT

    def tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The embedding of an empty caption, here zeros."""
        shape = (len(captions), self.length * self.dim)
        return np.zeros(shape, jnp.bfloat16), np.ones((len(captions), self.length), bool)

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """No weights."""
        return {}

    def apply(self, params: Any, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """ids [B, L * D] -> tokens [B, L, D], the mask, and no pooled embedding."""
        return ids.reshape(len(ids), *TEXT), mask, ids[:, :1]


def mesh_of(args: argparse.Namespace) -> Any:
    """The mesh of the arguments over the devices of a topology description."""
    return make_mesh(**({"data": 1, "fsdp": -1} | args.mesh), devices=slices.parse(args.topology).devices())


def build_step(args: argparse.Namespace) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """(jitted step, mesh, backbone, abstract inputs) for the arguments."""
    mesh = mesh_of(args)
    config = config_lib.defaults()
    config.batch = args.batch
    config.optim.update({"accumulate": args.accumulate, "ema": (0.9999,) if args.ema else ()})
    fields = {"dtype": "bfloat16", "scan_layers": True} | args.set
    backbone = backbones.create_for(args.backbone, in_channels=4, text_dim=TEXT[1], size=args.size, **fields)
    model = Model(
        codec=Latents(),
        text_encoder=Embeddings(),
        backbone=backbone,
        schedule=schedules.make_schedule(config.diffusion.schedule),
        prediction="eps",
        image_size=256,
        train_text_encoder=False,
        text_mask=args.text_mask,
    )
    optimizer = optim.make_optimizer(config.optim, config.steps)
    key = jax.random.key(0)
    boxed, _ = jax.eval_shape(model.init, key)
    abstract = jax.eval_shape(lambda k: init_state(model, optimizer, config, k), key)
    shardings = rules.state_shardings(mesh, abstract, rules.param_shardings(mesh, boxed))
    by_batch = rules.batch_sharding(mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    rows = {
        "images": ((args.batch, *LATENTS), jnp.float32),
        "ids": ((args.batch, TEXT[0] * TEXT[1]), jnp.bfloat16),
        "mask": ((args.batch, TEXT[0]), jnp.bool_),
    }
    batch = {k: jax.ShapeDtypeStruct(*v, sharding=by_batch) for k, v in rows.items()}
    gather = None
    if args.sparse_core:
        fsdp.check_sparse_core(mesh, args.gather_once)
    if args.gather_once:
        gather = functools.partial(
            fsdp.value_and_grad, mesh=mesh, shardings=shardings.params, sparse_core=args.sparse_core
        )
    step = jax.jit(
        make_train_step(model, optimizer, config, gather),
        in_shardings=(shardings, {"codec": {}, "text_encoder": {}}, by_batch),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return step, mesh, backbone, (state, {"codec": {}, "text_encoder": {}}, batch)


def compile_step(args: argparse.Namespace) -> tuple[str, Any, dict[str, Any]]:
    """(text of the compiled step, backbone, memory in GiB and the seconds of lowering and compiling)."""
    step, mesh, backbone, inputs = build_step(args)
    start = time.perf_counter()
    with rules.activate(mesh):
        lowered = step.lower(*inputs)
        middle = time.perf_counter()
        options = xla_flags.options(list(mesh.devices.flat), args.sparse_core) | args.options
        compiled, text = compiled_text(lowered, options)
    if not isinstance(text, str):
        sys.exit(f"the compiled step cannot be read: {text.reason}")
    memory = compiled.memory_analysis()
    return text, backbone, {
        "date": str(datetime.date.today()),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "peak_gib": memory.peak_memory_in_bytes / 2**30,
        "lower_s": middle - start,
        "compile_s": time.perf_counter() - middle,
    }  # fmt: skip


def saved_step(args: argparse.Namespace) -> tuple[str, Any, dict[str, Any]]:
    """As `compile_step`, for a program that was compiled and saved before with the same arguments."""
    with gzip.open(args.again, "rt") as file:
        text = file.read()
    before = json.loads(args.json.read_text())
    _, _, backbone, _ = build_step(args)
    return text, backbone, {name: before[name] for name in KNOWN}


def measures(args: argparse.Namespace, text: str, backbone: Any, known: dict[str, Any]) -> dict[str, Any]:
    """The compiler's numbers for the step, per chip: memory in GiB, FLOPs, cycles by part, collectives, MFU.

    `known` has the values that the program's text does not contain.
    """
    topology = slices.parse(args.topology)
    mesh = mesh_of(args)
    program, layout = Program(text), hlo_cost.Layout.of(mesh)
    found = hlo_cost.statistics(program, layout)
    flops = count(backbone, LATENTS, TEXT).train_flops(args.batch, 1, convention="total")
    roof = roofline(topology, found, flops, None, exposed=hlo_timeline.waiting(program, layout, topology))
    wire = {True: 0, False: 0}
    for row in found.collectives:
        wire[row.asynchronous] += row.wire
    return {
        "command": program_arguments(sys.argv[1:]),
        "label": args.label or f"{args.backbone} {args.size}",
        "topology": args.topology,
        "batch": args.batch,
        "model_tflop": flops / topology.chips / 1e12,
        "program_tflop": found.flops / 1e12,
        "cycles_m": found.cycles / 1e6,
        "parts_m": {name: cycles / 1e6 for name, cycles in found.parts.items() if cycles},
        "wire_sync_gb": wire[False] / 1e9,
        "wire_async_gb": wire[True] / 1e9,
        "exposed_ms": 1e3 * roof.exposed,
        "mfu_estimate": roof.mfu_estimate,
        "collectives": [
            f"{row.count} {row.kind} over {row.axes}, {row.wire / 1e9:.2f} GB" for row in found.collectives
        ],
        **known,
    }


def program_arguments(argv: Sequence[str]) -> str:
    """The arguments that determine the program, without the row's label and the files written."""
    kept, skip = [], False
    for word in argv:
        if word.startswith("--"):
            skip = word.partition("=")[0] in ("--label", "--json", "--hlo", "--again")
        if not skip:
            kept.append(word)
    return " ".join(kept)


# Values that the text of a program does not contain.
KNOWN = ("date", "versions", "arguments_gib", "peak_gib", "lower_s", "compile_s")
HEAD = (
    "step", "slice", "arguments GiB", "peak GiB", "TFLOP model", "TFLOP program", "M cycles", "GB sent sync", "async",
    "exposed ms", "MFU estimate", "compile s", "M cycles by part",
)  # fmt: skip


def table(files: list[pathlib.Path]) -> str:
    """A markdown table of saved JSON files, in the order given."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for file in files:
        row = json.loads(file.read_text())
        parts = sorted(row["parts_m"].items(), key=lambda part: -part[1])
        cells = [
            row["label"],
            f"{row['topology']}, batch {row['batch']}",
            *(f"{row[name]:.2f}" for name in ("arguments_gib", "peak_gib", "model_tflop", "program_tflop")),
            f"{row['cycles_m']:.0f}",
            *(f"{row[name]:.2f}" for name in ("wire_sync_gb", "wire_async_gb")),
            f"{row['exposed_ms']:.0f}",
            f"{row['mfu_estimate']:.1%}",
            f"{row['compile_s']:.0f}",
            ", ".join(f"{name} {cycles:.0f}" for name, cycles in parts if cycles >= 0.5),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles one step and prints its numbers, or prints a table of saved ones."""
    args = parse()
    if args.table:
        print(table(args.table))
        return
    text, backbone, known = saved_step(args) if args.again else compile_step(args)
    found = measures(args, text, backbone, known)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.hlo:
        with gzip.open(args.hlo, "wt") as file:
            file.write(text)


def pairs(text: str) -> tuple[str, Any]:
    """A `name=value` of the command line, with the value as a Python literal if it is one, else as text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="uvit")
    parser.add_argument("--size", default="h2048-d42-n16")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--gather-once", action="store_true", help="mesh.gather_once")
    parser.add_argument("--sparse-core", action="store_true", help="gather on SparseCores")
    parser.add_argument("--text-mask", action="store_true")
    parser.add_argument("--mesh", nargs="*", type=pairs, default=[], metavar="AXIS=N")
    parser.add_argument(
        "--set", nargs="*", type=pairs, default=[], metavar="FIELD=VALUE", help="of the backbone"
    )
    parser.add_argument("--options", nargs="*", type=pairs, default=[], metavar="NAME=VALUE", help="of XLA")
    parser.add_argument("--label", help="name of the row in a table")
    parser.add_argument(
        "--table", nargs="*", type=pathlib.Path, help="files to print as a table, in place of compiling"
    )
    parser.add_argument("--hlo", type=pathlib.Path, help="file for the compiled program's text, gzipped")
    parser.add_argument(
        "--again",
        type=pathlib.Path,
        help="a file of --hlo to evaluate again; --json names its old numbers",
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for the statistics")
    args = parser.parse_args(argv)
    if args.again and not args.json:
        parser.error("--again needs --json, the file with the numbers of that program")
    args.mesh, args.set, args.options = dict(args.mesh), dict(args.set), dict(args.options)
    return args


if __name__ == "__main__":
    main()
