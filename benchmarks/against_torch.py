"""Forward plus backward of each backbone against the same model in PyTorch, in one run.

    python benchmarks/against_torch.py --note=benchmarks/against_torch_cpu.md
    python benchmarks/against_torch.py --families uvit,pixart --size large --batch 32 --dtype bfloat16 --compile

Both sides hold the same weights (through `scaling_dit.interop`), get the same inputs and must agree before anything is
timed. PyTorch runs diffusers' class, or for U-ViT and Large-DiT benchmarks/torch_models.py. A measurement is the time
of one finished call that computes the loss and its gradient with respect to all parameters. Calls alternate between the
two sides, and their medians are compared. A UNet's convolutions are also timed alone, because they dominate its ratio.
Runs on the CPU, or on a GPU if jax and torch both see one.
"""

import argparse
import dataclasses
import importlib.metadata
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_models
from header import header

from scaling_dit import backbones, interop, trees
from scaling_dit.interop.diffusers import config as diffusers_config
from scaling_dit.monitor.host import cores

# 256 px through an 8x autoencoder, and CLIP-H text.
LATENTS, TEXT = (32, 32, 4), (77, 1024)
# 30 to 60 million parameters each, and the papers' scale.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "uvit": {"hidden": 512, "depth": 12, "heads": 8},
        "pixart": {"hidden": 512, "depth": 8, "heads": 8},
        "large_dit": {"hidden": 512, "depth": 6, "heads": 8},
        "next_dit": {"hidden": 512, "depth": 6, "heads": 8},
        "unet": {"size": "sd2", "channels": 64, "head_dim": 64},
        "unet_if": {"size": "if-xl", "channels": 64},
    },
    "large": {
        "uvit": {"size": "h2048-d42-n16"},
        "pixart": {"size": "h2048-d28-n16"},
        "large_dit": {"size": "h2048-d28-n16"},
        "next_dit": {"size": "h2304-d24-n32"},
        "unet": {"size": "sdxl"},
        "unet_if": {"size": "if-xl-c512"},
    },
}


# (side, channels) of the small UNet's levels.
CONVOLUTIONS = ((32, 64), (16, 128), (8, 256))


@dataclasses.dataclass
class Sides:
    """The same computation on both sides, as calls that wait for it."""

    ours: Callable[[], float]
    theirs: Callable[[], float]


@dataclasses.dataclass
class Pair(Sides):
    """One model on both sides: calls that return the loss, and what they are."""

    params: int
    # Of the predictions, relative to the largest value.
    difference: float
    torch_class: str


def main() -> None:
    """Times every family, prints a line for each, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(SIZES["small"]))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the PyTorch side")
    parser.add_argument("--threads", type=int, default=len(cores()), help="of PyTorch; XLA takes all cores")
    parser.add_argument("--note", type=pathlib.Path, help="markdown file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.families.split(","):
        pair = make_pair(name, SIZES[args.size][name], args)
        ours, theirs = alternate(pair, args.rounds)
        rows.append((name, pair, ours, theirs))
        print(
            f"{name}: {pair.params / 1e6:.1f} M parameters, batch {args.batch}, latents {LATENTS}, text {TEXT}, "
            f"{args.dtype}: ours {ours:.3f} s, torch {theirs:.3f} s, ratio {theirs / ours:.2f}, "
            f"outputs differ by {pair.difference:.1e}",
            flush=True,
        )
    parts = []
    if any(name.startswith("unet") for name in args.families.split(",")):
        for side, channels in CONVOLUTIONS:
            parts.append((side, channels, *alternate(convolution(side, channels, args), 5 * args.rounds)))
            print("3x3 convolution, side {}, {} channels: ours {:.4f} s, torch {:.4f} s".format(*parts[-1]))
    if args.note:
        args.note.write_text(note(rows, parts, args))


def make_pair(name: str, fields: dict[str, Any], args: argparse.Namespace) -> Pair:
    """Both models with the same weights on the same inputs; the loss is the mean of prediction x fixed noise."""
    backbone: Any = backbones.create_for(name, in_channels=4, text_dim=TEXT[1], dtype=args.dtype, **fields)
    rng = np.random.default_rng(0)
    latents, noise = (rng.normal(size=(args.batch, *LATENTS)).astype(np.float32) for _ in range(2))
    times = np.linspace(100, 900, args.batch).astype(np.float32)
    text = rng.normal(size=(args.batch, *TEXT)).astype(np.float32)
    mask = np.ones(text.shape[:2], bool)
    variables = random_weights(backbone, latents, times, text, mask)
    net = torch_model(name, backbone, variables, getattr(torch, args.dtype))
    forward = torch_forward(name, net, backbone)
    if args.compile:
        forward = torch.compile(forward)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.from_numpy(x).to(place) for x in (latents, times, text, mask, noise)]
    t_latents, t_times, t_text, t_mask, t_noise = tensors
    t_latents, t_noise = (x.permute(0, 3, 1, 2).contiguous() for x in (t_latents, t_noise))
    t_latents, t_text = (x.to(getattr(torch, args.dtype)) for x in (t_latents, t_text))
    inputs = tuple(map(jnp.asarray, (latents, times, text, mask)))

    def loss(variables: Any) -> tuple[jax.Array, jax.Array]:
        prediction = backbone.apply(variables, *inputs)
        return jnp.mean(prediction * noise), prediction

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def ours() -> float:
        (value, _), _ = jax.block_until_ready(step(variables))
        return float(value)

    def theirs() -> float:
        net.zero_grad(set_to_none=True)
        value = (forward(t_latents, t_times, t_text, t_mask).float() * t_noise).mean()
        value.backward()
        # Waits for a GPU.
        return value.item()

    (_, prediction), _ = step(variables)
    with torch.no_grad():
        other = forward(t_latents, t_times, t_text, t_mask).float().cpu().permute(0, 2, 3, 1).numpy()
    difference = float(np.abs(np.asarray(prediction) - other).max() / np.abs(other).max())
    if difference > (1e-3 if args.dtype == "float32" else 5e-2):
        raise SystemExit(f"{name}: outputs differ by {difference:.1e}; the two are not the same model")
    params = sum(leaf.size for leaf in jax.tree.leaves(variables))
    return Pair(
        ours, theirs, params, difference, type(net).__module__.split(".")[0] + "." + type(net).__name__
    )


def convolution(side: int, channels: int, args: argparse.Namespace) -> Sides:
    """A 3x3 convolution of a UNet's level: forward, and gradients with respect to input and kernel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.batch, side, side, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels, channels)).astype(np.float32)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout).mean()

    place, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    arrays = [jnp.asarray(part, args.dtype) for part in (x, kernel)]
    tensors = [
        torch.from_numpy(part).permute(order).contiguous().to(place, dtype).requires_grad_()
        for part, order in ((x, (0, 3, 1, 2)), (kernel, (3, 2, 0, 1)))
    ]
    step = jax.jit(jax.value_and_grad(convolve, (0, 1)))

    def theirs() -> float:
        for tensor in tensors:
            tensor.grad = None
        value = torch.nn.functional.conv2d(*tensors, padding=1).mean()
        value.backward()
        return value.item()

    return Sides(lambda: float(jax.block_until_ready(step(*arrays))[0]), theirs)


def random_weights(backbone: Any, *inputs: np.ndarray) -> Any:
    """Fresh weights with noise added, so that no zero-initialised layer hides a difference."""
    variables = trees.unbox(jax.jit(backbone.init)(jax.random.key(0), *inputs))
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    noisy = [jnp.asarray(x + 0.02 * rng.normal(size=x.shape).astype(np.float32)) for x in leaves]
    return jax.tree.unflatten(structure, noisy)


def torch_model(name: str, backbone: Any, variables: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The same model in PyTorch, with the same weights."""
    state = {k: torch.from_numpy(v.copy()) for k, v in interop.to_state_dict(backbone, variables).items()}
    net: Any
    if name in ("uvit", "large_dit"):
        hidden, depth, heads = backbone.widths
        shared = (hidden, depth, heads, backbone.patch, 4, TEXT[1])
        tokens = 1 + TEXT[0] + LATENTS[0] * LATENTS[1] // backbone.patch**2
        net = torch_models.UViT(*shared, tokens=tokens) if name == "uvit" else torch_models.LargeDiT(*shared)
    else:
        import diffusers

        config = diffusers_config.write_config(name, backbone, LATENTS[:2])
        net = getattr(diffusers, config["_class_name"]).from_config(config)
    net.load_state_dict(state, strict=True)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    return net.to(place) if dtype == torch.float32 else net.to(place, dtype)


def torch_forward(name: str, net: Any, backbone: Any) -> Callable[..., torch.Tensor]:
    """The call of each class as (latents, times, text, mask) -> prediction."""
    if name == "uvit":
        return lambda x, t, text, mask: net(x, t, text)
    if name == "large_dit":
        return net
    if name == "pixart":
        return lambda x, t, text, mask: net(x, text, t, {}, encoder_attention_mask=mask).sample
    if name == "next_dit":
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

        hidden, _, heads = backbone.widths
        rows, columns = (side // backbone.patch for side in LATENTS[:2])
        rotary = get_2d_rotary_pos_embed_lumina(hidden // heads, rows, columns)
        rotary = rotary.to(next(net.parameters()).device)
        # Its time runs from 0 to 1; the embedding itself takes any number.
        return lambda x, t, text, mask: net(x, t, text, mask, rotary, {}).sample
    return lambda x, t, text, mask: net(x, t, text, encoder_attention_mask=mask).sample


def alternate(pair: Sides, rounds: int) -> tuple[float, float]:
    """Median seconds of each side over alternating calls, after a call each that compiles."""
    pair.ours(), pair.theirs()
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side in ("ours", "theirs"):
            start = time.perf_counter()
            getattr(pair, side)()
            times[side].append(time.perf_counter() - start)
    return statistics.median(times["ours"]), statistics.median(times["theirs"])


def note(
    rows: Iterable[tuple[str, Pair, float, float]],
    parts: Sequence[tuple[int, int, float, float]],
    args: argparse.Namespace,
) -> str:
    """The markdown of all rows, and of the convolutions `parts` if there are any."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers"))
    lines = [
        *header("Forward plus backward against PyTorch", "benchmarks/against_torch.py"),
        f"{versions}; {device}, {args.threads} threads, {'torch.compile' if args.compile else 'eager'}, {args.dtype}.",
        "",
        f"Batch {args.batch}, latents {'x'.join(map(str, LATENTS))}, text {'x'.join(map(str, TEXT))}, all tokens real. "
        f"Medians of {args.rounds} alternating rounds, compilation not counted; above 1, ours is faster.",
        "",
        "| backbone | parameters | PyTorch class | ours, s | PyTorch, s | PyTorch / ours | outputs differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pair, ours, theirs in rows:
        lines.append(
            f"| {name} | {pair.params / 1e6:.1f} M | {pair.torch_class} | {ours:.3f} | {theirs:.3f} | "
            f"{theirs / ours:.2f} | {pair.difference:.1e} |"
        )
    if parts:
        lines += [
            "",
            "## 3x3 convolutions alone",
            "",
            "What UNets mostly consist of: forward, and gradients of input and kernel, at the small UNet's levels.",
            "",
            "| map | channels | ours, ms | PyTorch, ms | PyTorch / ours |",
            "|---|---|---|---|---|",
        ]
    for side, channels, ours, theirs in parts:
        lines.append(
            f"| {side}x{side} | {channels} | {1e3 * ours:.2f} | {1e3 * theirs:.2f} | {theirs / ours:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
