"""Seconds and memory of the metrics that are networks and statistics.

    python benchmarks/metrics.py --note=benchmarks/metrics_cpu.md
    python benchmarks/metrics.py --images=512 --batch=64 --counts= --note=benchmarks/metrics_h200.md

First each network in its published size with random weights, on images of 256 px: seconds for 1,000 images, with the
preparation of their pixels. Then each statistic on made features of 1,000, 10,000 and 100,000 images against 10,000
real ones, each in a process of its own: seconds, and the most memory it held beyond what its imports took.
"""

import argparse
import functools
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from header import header
from peak import peak_mib

SIDE, REAL = 256, 10_000
# Features of Inception, and of CLIP ViT-L/14.
WIDTHS = {"fid": 2048, "kid": 2048, "mind": 2048, "cmmd": 768}


def main() -> None:
    """Measures, prints, and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, help="markdown file to write")
    parser.add_argument("--images", type=int, default=8, help="images of each network; 0 leaves networks out")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--counts", default="1000,10000,100000", help="images of each statistic; empty leaves them out"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, count = args.one.split(":")
        print(*statistic(name, int(count)))
        return
    lines = header("What metrics cost", "benchmarks/metrics.py")
    if args.images:
        lines += ["", f"Random weights, {args.images} images of {SIDE} px, {args.batch} at once.", ""]
        lines += table(["metric", "network", "seconds for 1,000 images"], networks(args.images, args.batch))
    counts = [int(count) for count in args.counts.split(",") if count]
    if counts:
        about = f"{REAL:,} real images; one thread of numpy. MiB: the most that was held, without imports."
        lines += ["", f"Statistics of made features, against {about}", ""]
        lines += table(["metric", "images", "seconds", "MiB"], statistics(counts))
    print("\n".join(lines))
    if args.note:
        args.note.write_text("\n".join(lines) + "\n")


def table(head: list[str], rows: Iterator[list[str]]) -> list[str]:
    """A markdown table; its rows are also printed as they are measured."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head))]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def statistics(counts: list[int]) -> Iterator[list[str]]:
    """Rows of the table of statistics."""
    for name in WIDTHS:
        for count in counts:
            command = [sys.executable, __file__, f"--one={name}:{count}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, size = map(float, done.stdout.split()[-2:])
            yield [name, f"{count:,}", f"{seconds:.1f}", f"{size:.0f}"]


def statistic(name: str, count: int) -> tuple[float, float]:
    """(seconds, MiB) of one statistic, in this process."""
    from scaling_dit.evaluation import METRICS
    from scaling_dit.evaluation.features.references import Reference
    from scaling_dit.evaluation.features.tables import FeatureTable

    width = WIDTHS[name]
    ours, real = (FeatureTable.spill(made(n, width, seed), width) for seed, n in enumerate((count, REAL)))
    before = peak_mib()
    metric: Any = METRICS[name](**({"points": 0} if name == "fid" else {}))
    start = time.perf_counter()
    metric.compare(ours, Reference.of_table(real), 0)
    seconds = time.perf_counter() - start
    return seconds, peak_mib() - before


def made(count: int, width: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of features; those of CLIP's width have length 1."""
    mix = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32) / 8
    rng = np.random.default_rng(seed + 1)
    for start in range(0, count, 1000):
        rows = min(1000, count - start)
        block = np.abs(rng.normal(size=(rows, 64)).astype(np.float32) @ mix + 0.1 * seed)
        block += 0.1 * rng.normal(size=(rows, width)).astype(np.float32)
        yield block / np.linalg.norm(block, axis=1, keepdims=True) if width == WIDTHS["cmmd"] else block


def networks(count: int, batch: int) -> Iterator[list[str]]:
    """Rows of the table of networks."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    for metrics, name, make in NETWORKS:
        run = make(batch)
        # Compiles.
        run(images[:batch])
        start = time.perf_counter()
        run(images)
        yield [metrics, name, f"{(time.perf_counter() - start) / count * 1000:.1f}"]


def filled(abstract: Any) -> Any:
    """Random parameters of these shapes."""
    import jax

    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), abstract)


def inception(batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """Inception, with the preparation of pixels that FID has."""
    import jax.numpy as jnp

    from scaling_dit.evaluation.features import inception, pixels
    from scaling_dit.evaluation.features.sharded import Sharded

    def features(params: Any, images: Any) -> Any:
        resized = pixels.tensorflow1(images.astype(jnp.float32), inception.SIDE)
        return inception.Inception().apply({"params": params}, pixels.minus_one_to_one(resized))

    return Sharded(features, filled(inception.abstract()), batch)


def dinov2(batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """DINOv2 ViT-L/14."""
    import jax

    from scaling_dit.evaluation.features import dinov2, pixels
    from scaling_dit.evaluation.features.sharded import Sharded

    size = dinov2.SIZES["dinov2-l"]
    tower = dinov2.Dinov2(size)
    shape = jax.ShapeDtypeStruct((1, size.image, size.image, 3), np.float32)
    params = filled(unboxed(tower, shape))
    run = Sharded(lambda params, x: tower.apply({"params": params}, x), params, batch)
    return lambda images: run(pixels.standardise(pixels.squash(images, size.image), dinov2.MEAN, dinov2.STD))


def clip(size: str, batch: int, *, captions: bool) -> Callable[[np.ndarray], np.ndarray]:
    """CLIP's image tower, and with `captions` its text tower too."""
    import jax

    from scaling_dit.encoders import clip_vision
    from scaling_dit.encoders.clip import ClipText
    from scaling_dit.evaluation.features import clip_pairs
    from scaling_dit.evaluation.features.sharded import Sharded

    shape = clip_vision.SIZES[size]
    images = jax.ShapeDtypeStruct((1, shape.image, shape.image, 3), np.float32)
    params = {"image": filled(unboxed(clip_vision.VisionTower(shape), images))}
    text = ClipText(size=size, layer="last", project=True)
    ids = np.full((1, text.length), 7, np.int32)
    if captions:
        params["text"] = filled(unboxed(text.module, jax.ShapeDtypeStruct(ids.shape, np.int32)))

    def score(params: Any, images: Any, ids: Any) -> Any:
        found = clip_pairs.embed(shape, params["image"], images)
        if captions:
            found *= clip_vision.unit(text.apply(params["text"], ids, ids > 0)[2])
        return found.sum(-1)

    run = Sharded(score, params, batch)
    return lambda images: run(clip_pairs.prepare(images, shape.image), np.repeat(ids, len(images), 0))


def blip(batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """ImageReward's BLIP."""
    from scaling_dit.evaluation.features import blip, clip_pairs
    from scaling_dit.evaluation.features.sharded import Sharded

    size = blip.SIZES["large"]
    params = filled(blip.abstract(size)) | {"head": (np.ones(size.width, np.float32), np.float32(0))}
    run = Sharded(functools.partial(blip.reward, size), params, batch)
    ids = np.full((1, blip.LENGTH), 7, np.int32)

    def rewards(images: np.ndarray) -> np.ndarray:
        rows = np.repeat(ids, len(images), 0)
        return run(clip_pairs.prepare(images, size.image), rows, rows > 0)

    return rewards


def unboxed(module: Any, *inputs: Any) -> Any:
    """Shapes of a module's parameters."""
    import jax

    from scaling_dit import trees

    return trees.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


NETWORKS: list[tuple[str, str, Callable[[int], Callable[[np.ndarray], np.ndarray]]]] = [
    ("fid, kid, mind", "Inception", inception),
    ("fd_dinov2", "DINOv2 ViT-L/14", dinov2),
    ("aesthetic", "CLIP ViT-L/14, images", functools.partial(clip, "clip-l", captions=False)),
    ("clip_score", "CLIP ViT-L/14", functools.partial(clip, "clip-l", captions=True)),
    ("cmmd", "CLIP ViT-L/14 at 336 px, images", functools.partial(clip, "clip-l-336", captions=False)),
    ("hpsv2, pickscore", "CLIP ViT-H/14", functools.partial(clip, "openclip-h", captions=True)),
    ("image_reward", "BLIP ViT-L/16 and BERT", blip),
]


if __name__ == "__main__":
    main()
