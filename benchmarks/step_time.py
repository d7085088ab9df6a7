"""Train-step time, MFU, images/s, tokens/s and memory of each backbone on the devices of this machine.

    python benchmarks/step_time.py --size tiny --batch 4
    python benchmarks/step_time.py --families uvit,pixart,large_dit --size large --batch 16,32,64 --note NOTE.md

A step is noise, forward, loss, gradients, AdamW and one weight average, on random latents and text, with float32
parameters split over all devices. Every batch size is timed; a batch that does not fit is reported. MFU is 6 x
multiply-accumulates of the backbone per image (attention in full, no rematerialisation) over the dense bfloat16 peak of
parallel/topologies.py. Without a known peak, as on CPUs, no MFU is printed. Needs only jax, flax, optax, numpy, einops
and absl.
"""

import argparse
import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from header import header

from scaling_dit import backbones, trees
from scaling_dit.backbones import contract
from scaling_dit.costs.count import count
from scaling_dit.parallel import rules, topologies
from scaling_dit.parallel.mesh import make_mesh

# 256 px through an 8x autoencoder, and CLIP-H text.
LATENTS, TEXT = (32, 32, 4), (77, 1024)
_TWO_LEVELS = {"channels": 32, "channel_mult": (1, 2), "res_blocks": 1, "head_dim": 32}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "uvit": {"hidden": 128, "depth": 4, "heads": 2},
        "pixart": {"hidden": 128, "depth": 4, "heads": 2},
        "large_dit": {"hidden": 128, "depth": 4, "heads": 2},
        "next_dit": {"hidden": 128, "depth": 4, "heads": 2},
        # Two levels, because on a CPU XLA compiles the four levels of a published size for minutes.
        "unet": {**_TWO_LEVELS, "transformer_depth": (0, 1)},
        "unet_if": {**_TWO_LEVELS, "attention_levels": (1,)},
    },
    "large": {
        "uvit": {"size": "h2048-d42-n16"},
        "pixart": {"size": "h2048-d28"},
        "large_dit": {"size": "h2048-d28-n16"},
        "next_dit": {"size": "h2304-d24-n32"},
        "unet": {"size": "sdxl"},
        "unet_if": {"size": "if-xl-c512"},
    },
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      name: the backbone.
      params: its parameters.
      batch: images of a step.
      seconds: time of a step.
      flops: model FLOPs of a step.
      tokens: image tokens of a step.
      memory: peak bytes in use on the fullest device since the process began.
    """

    name: str
    params: int
    batch: int
    seconds: float
    flops: float
    tokens: int
    memory: int | None

    def mfu(self, peak: float) -> float:
        """Share of the peak [FLOP/s] of all devices."""
        return self.flops / self.seconds / peak


def main() -> None:
    """Times every family at every batch size, prints a line for each, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(SIZES["tiny"]))
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--batch", default="4", help="global batch sizes, separated by commas")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--remat", default="none")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--scan", action="store_true", help="scan over layers")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--note", type=pathlib.Path, help="markdown file to write")
    args = parser.parse_args()
    rows = []
    for name in args.families.split(","):
        for batch in map(int, args.batch.split(",")):
            try:
                rows.append(measure(name, SIZES[args.size][name], batch, args))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{name}: batch {batch} does not fit", flush=True)
                break
            print(describe(rows[-1]), flush=True)
    if args.note:
        args.note.write_text(note(rows, args))


def measure(name: str, fields: dict[str, Any], batch: int, args: argparse.Namespace) -> Row:
    """Compiles and times one train step."""
    modes: dict[str, Any] = {"dtype": args.dtype, "remat": args.remat, "attention": args.attention}
    if args.scan and name != "unet_if":
        modes["scan_layers"] = True
    backbone = backbones.create_for(name, in_channels=LATENTS[2], text_dim=TEXT[1], **modes, **fields)
    inputs = contract.example_inputs(backbone, LATENTS, TEXT)
    mesh = make_mesh(data=1, fsdp=-1)
    optimizer = optax.adamw(8e-5, weight_decay=0.01)

    def init(key: jax.Array) -> Any:
        params = trees.unbox(backbone.init(key, *zeros(inputs)))["params"]
        return {"params": params, "opt": optimizer.init(params), "ema": jax.tree.map(jnp.copy, params)}

    def step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        keys = jax.random.split(key, 4)
        latents, noise = (jax.random.normal(k, (batch, *LATENTS)) for k in keys[:2])
        text = jax.random.normal(keys[2], (batch, *TEXT))
        times = jax.random.uniform(keys[3], (batch,), maxval=1000.0)
        latents, noise, text, times = jax.lax.with_sharding_constraint(
            (latents, noise, text, times), rules.batch_sharding(mesh)
        )
        mask = jnp.ones((batch, TEXT[0]), bool)

        def loss(params: Any) -> jax.Array:
            signal = jnp.cos(times * (jnp.pi / 2000))[:, None, None, None]
            noisy = signal * latents + jnp.sqrt(1 - signal**2) * noise
            return jnp.mean((backbone.apply({"params": params}, noisy, times, text, mask) - noise) ** 2)

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda mean, new: mean + 1e-4 * (new - mean), state["ema"], params)
        return {"params": params, "opt": opt, "ema": ema}, value

    boxed = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)["params"]
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = rules.state_shardings(mesh, abstract, rules.param_shardings(mesh, boxed))
    # Only random weights are needed. jax's default generator takes longer to compile for a UNet than its step.
    seed = jax.random.key(0, impl="unsafe_rbg")
    state = jax.jit(init, out_shardings=shardings)(seed)
    with rules.activate(mesh):
        run = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        seconds = []
        for i in range(args.steps + 2):
            key = jax.random.fold_in(jax.random.key(1), i)
            start = time.perf_counter()
            state, value = run(state, key)
            # Waits for the step.
            float(value)
            seconds.append(time.perf_counter() - start)
    counted = count(backbone, LATENTS, TEXT)
    tokens = batch * LATENTS[0] * LATENTS[1] // getattr(backbone, "patch", 1) ** 2
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    memory = max((one.get("peak_bytes_in_use", 0) for one in stats), default=0) or None
    flops = counted.train_flops(batch, 1, convention="total")
    return Row(name, counted.params, batch, statistics.median(seconds[2:]), flops, tokens, memory)


def zeros(inputs: Any) -> Any:
    """A tree of zeros with the same shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)


def peak() -> float | None:
    """The dense bfloat16 peak of all devices together, in FLOP/s; None if it is not known."""
    chip = topologies.find_chip(jax.devices()[0].device_kind)
    return None if chip is None else chip.peak * jax.device_count()


def cells(row: Row) -> list[str]:
    """The values of a row as text."""
    whole = peak()
    return [
        row.name,
        f"{row.params / 1e6:.1f} M",
        f"{row.batch}",
        f"{1e3 * row.seconds:.1f}",
        f"{row.batch / row.seconds:.1f}",
        f"{row.tokens / row.seconds:.0f}",
        f"{row.flops / row.seconds / 1e12:.2f}",
        "-" if whole is None else f"{row.mfu(whole):.1%}",
        "-" if row.memory is None else f"{row.memory / 2**30:.1f}",
    ]


HEAD = [
    "backbone",
    "parameters",
    "batch",
    "ms",
    "images/s",
    "image tokens/s",
    "TFLOP/s",
    "MFU",
    "GiB at most",
]


def describe(row: Row) -> str:
    """A row as one line."""
    return ", ".join(f"{name} {value}" for name, value in zip(HEAD, cells(row), strict=True))


def note(rows: list[Row], args: argparse.Namespace) -> str:
    """All rows as markdown."""
    layers = "scanned" if args.scan else "unrolled"
    lines = [
        *header("Time of a train step", "benchmarks/step_time.py"),
        f"{jax.device_count()} x {jax.devices()[0].device_kind}.",
        "",
        f"{args.dtype}, remat {args.remat}, attention {args.attention}, {layers} layers; latents "
        f"{'x'.join(map(str, LATENTS))}, text {'x'.join(map(str, TEXT))}; medians of {args.steps} steps.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
