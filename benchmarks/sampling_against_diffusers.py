"""Whole sampling, from prompts to images, against diffusers with the same pipeline, in one run on the same threads.

    python benchmarks/sampling_against_diffusers.py --note=benchmarks/sampling_against_diffusers_cpu.md

A PixArt pipeline of diffusers with random weights (backbone, autoencoder, T5 and its tokenizer) is saved, imported as a
run by `scaling-dit import`, and sampled by both: tokenizer, text encoder, DDIM with guidance, autoencoder. Both start
from the same noise and must agree before anything is timed. Both compute in float32 on the same cores: the process is
bound to as many as there are threads. Calls alternate, each side first in turn, and their medians are compared; what is
compiled is compiled before, and both are warmed up. diffusers is run as its users run it, eagerly, with --compile its
backbone is compiled.
"""

import argparse
import importlib.metadata
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from header import header

from scaling_dit.cli import main as cli
from scaling_dit.monitor.host import cores
from scaling_dit.sampling import pipeline
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.sampler import Sampler

# Sides of images in pixels, of a latent, and tokens of a prompt.
PIXELS, SIDE, LENGTH = 64, 32, 40
WORDS = (
    "a",
    "the",
    "red",
    "blue",
    "green",
    "small",
    "large",
    "circle",
    "square",
    "triangle",
    "above",
    "left",
    "of",
)
PROMPTS = (
    "a red circle above a blue square",
    "the large green triangle",
    "a small square left of a circle",
    "",
)
GUIDANCE = 4.5
SIZES: dict[str, dict[str, int]] = {
    "small": {"heads": 4, "depth": 4, "hidden": 128},
    "medium": {"heads": 8, "depth": 8, "hidden": 512},
}
# Mean difference of images in [0, 255] that rounding explains, also as a share of what images of two prompts differ by.
CLOSE, SHARE = 1.0, 0.1
# Calls of each side before anything is timed.
WARM = 2


def main() -> None:
    """Times every row, prints it, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--threads", type=int, default=len(cores()), help="of both sides, each on a core of its own"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone of diffusers")
    parser.add_argument("--note", type=pathlib.Path, help="markdown file to write")
    args = parser.parse_args()
    if not 1 <= args.threads <= len(cores()):
        parser.error(f"--threads={args.threads}: this process has {len(cores())} cores")
    # Before jax makes its threads: XLA takes as many as the process has cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[: args.threads])
    torch.set_num_threads(args.threads)
    rows = []
    for size in args.sizes.split(","):
        rows.append(row(size, args))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    if args.note:
        args.note.write_text(note(rows, args))


def row(size: str, args: argparse.Namespace) -> list[str]:
    """Times one pipeline on both sides."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        saved = make_pipeline(**SIZES[size])
        saved.save_pretrained(place / "pipeline")
        command = [
            "import", f"--from={place / 'pipeline'}", "--config=experiments/shapes.py:smoke",
            f"--workdir={place / 'run'}", "--config.backbone.name=pixart",
            "--config.backbone.dtype=float32", f"--config.text_encoder.length={LENGTH}",
            "--config.log.tensorboard=false",
        ]  # fmt: skip
        if cli.main(command):
            raise SystemExit("the pipeline of diffusers was not imported")
        run, noise = ours(place / "run", args.steps)
        other = theirs(saved, noise, args)
        first, second = [[call() for _ in range(WARM)][-1] for call in (run, other)]
        images = 255 * second
        difference = float(np.abs(first.astype(float) - images).mean())
        # Of random weights images of all prompts might be alike, and then agree for nothing.
        apart = float(np.abs(images - np.roll(images, 1, axis=0)).mean())
        if difference > min(CLOSE, SHARE * apart):
            raise SystemExit(
                f"images differ by {difference:.2f} of 255, those of two prompts by {apart:.2f}; "
                "the two are not the same pipeline"
            )
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(args.rounds):
            order = [(run, seconds[0]), (other, seconds[1])]
            for call, kept in order if number % 2 else reversed(order):
                start = time.perf_counter()
                call()
                kept.append(time.perf_counter() - start)
    mine, their = map(statistics.median, seconds)
    params = sum(p.numel() for p in saved.transformer.parameters())
    return [
        size, f"{params / 1e6:.1f} M", f"{mine:.3f}", f"{their:.3f}", f"{their / mine:.2f}", f"{difference:.2f}"
    ]  # fmt: skip


def ours(workdir: pathlib.Path, steps: int) -> tuple[Callable[[], np.ndarray], np.ndarray]:
    """A call that samples the prompts, uint8 [N, H, W, 3], and the noise that it starts from."""
    pipe = pipeline.load(str(workdir))
    sampler = Sampler(
        pipe.model, pipe.mesh, SamplingOptions.of(pipe.config.sample, sampler="ddim", steps=steps, guidance=GUIDANCE)
    )  # fmt: skip
    noise = np.asarray(pipe.model.noise(jax.random.key(0), jnp.arange(len(PROMPTS))))
    return lambda: sampler(pipe.params, pipe.frozen, PROMPTS, seed=0), noise


def theirs(pipe: Any, noise: np.ndarray, args: argparse.Namespace) -> Callable[[], Any]:
    """A call that samples the same with diffusers, float [N, H, W, 3] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    if args.compile:
        pipe.transformer = torch.compile(pipe.transformer)
    latents = torch.tensor(noise.transpose(0, 3, 1, 2))

    @torch.inference_mode()
    def call() -> Any:
        return pipe(
            prompt=list(PROMPTS), negative_prompt=[""] * len(PROMPTS), latents=latents.clone(),
            num_inference_steps=args.steps, guidance_scale=GUIDANCE, output_type="np", max_sequence_length=LENGTH,
            use_resolution_binning=False, clean_caption=False,
        ).images  # fmt: skip

    return call


def tokenizer() -> Any:
    """A T5 tokenizer of few words and all letters they need."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -6.0) for letter in letters if letter != "a"]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return transformers.T5Tokenizer(vocab=pieces, model_max_length=LENGTH)


def make_pipeline(hidden: int, depth: int, heads: int) -> Any:
    """A pipeline with random weights: 32 x 32 latents of 64 px, so that the backbone dominates."""
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=hidden // heads, num_layers=depth, in_channels=4,
        out_channels=8, cross_attention_dim=hidden, sample_size=SIDE, patch_size=2, caption_channels=32,
        use_additional_conditions=False, interpolation_scale=1,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), latent_channels=4, norm_num_groups=8, sample_size=PIXELS,
    )  # fmt: skip
    t5 = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=32_128, feed_forward_proj="gated-gelu"
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        transformer=transformer.eval(),
        vae=autoencoder.eval(),
        text_encoder=transformers.T5EncoderModel(t5).eval(),
        tokenizer=tokenizer(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
    )  # fmt: skip


def note(rows: list[list[str]], args: argparse.Namespace) -> str:
    """All rows as markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers")
    )
    lines = [
        *header("Sampling against diffusers", "benchmarks/sampling_against_diffusers.py"),
        f"{versions}; {args.threads} threads for both, {'torch.compile' if args.compile else 'eager'}, float32.",
        "",
        f"PixArtAlphaPipeline, {len(PROMPTS)} prompts, DDIM with {args.steps} steps, guidance {GUIDANCE}, latents "
        f"{SIDE}x{SIDE}, {LENGTH} tokens. Medians of {args.rounds} alternating rounds, compilation not counted; above "
        "1, ours is faster. The last column is the mean difference of the images, of 255.",
        "",
        "| size | parameters | ours, s | diffusers, s | diffusers / ours | images differ by |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
