"""Images a second in each stage of `prepare` on this machine.

    python benchmarks/prepare.py --note=benchmarks/prepare_cpu.md

Writes a webdataset of JPEG files, crops of the photographs that come with scikit-image and scikit-learn, at 384 x 384
px and quality 90, and times reading, decoding, cropping to 256 px and writing records, each in one thread. Encoding is
timed separately, on few images, with SDXL's autoencoder (random weights) on the devices of this machine.
"""

import argparse
import io
import json
import os
import pathlib
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import skimage
from array_record.python.array_record_module import ArrayRecordWriter
from note import header
from PIL import Image
from sklearn.datasets import load_sample_images

from scaling_dit import trees
from scaling_dit.curation import encode, shape
from scaling_dit.data import images
from scaling_dit.data.prepared import records
from scaling_dit.data.sources import create_raw_source
from scaling_dit.encoders.codec import create_codec

SIDE, RAW_SIDE = 256, 384
# bfloat16 FLOP/s of a chip, chips of a v5p-128, and an assumed utilisation for a convolutional network.
V5P_PEAK, CHIPS, UTILISATION = 459e12, 64, 0.3
# Of training.
BATCH, STEPS_PER_SECOND = 2048, 3


def main() -> None:
    """Measures and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--encoded", type=int, default=4, help="images of the one batch that is encoded")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tar(pathlib.Path(folder) / "00000.tar", args.images)
        rates = stage_rates(pathlib.Path(folder))
    rates["encode"], flops = encode_rate(args.encoded)
    args.note.write_text(note(args, rates, flops))


def write_tar(path: pathlib.Path, count: int) -> None:
    """Crops at random places, as one tar of img2dataset would hold them."""
    rng = np.random.default_rng(0)
    photos = [skimage.data.astronaut(), skimage.data.coffee(), *load_sample_images().images]
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            photo = photos[i % len(photos)]
            top, left = (int(rng.integers(side - RAW_SIDE + 1)) for side in photo.shape[:2])
            buffer = io.BytesIO()
            crop = photo[top : top + RAW_SIDE, left : left + RAW_SIDE]
            Image.fromarray(crop).save(buffer, "JPEG", quality=90)
            metadata = json.dumps({"aesthetic": i % 10}).encode()
            for ending, data in (("jpg", buffer.getvalue()), ("txt", b"a photograph"), ("json", metadata)):
                info = tarfile.TarInfo(f"{i:09d}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def stage_rates(folder: pathlib.Path) -> dict[str, float]:
    """Images per second of each stage but encoding, one after the other in one thread."""
    source = create_raw_source(f"webdataset:{folder}/*.tar", image_size=SIDE)
    source.shards()
    rates: dict[str, float] = {}

    def timed(name: str, work: Callable[[], list[Any]]) -> list[Any]:
        start = time.perf_counter()
        result = work()
        rates[name] = len(result) / (time.perf_counter() - start)
        return result

    samples = timed("read", lambda: list(source.samples(0)))
    decoded = timed("decode", lambda: [images.decode(s.image, s.where, s.key) for s in samples])
    shaped = timed("cut to size", lambda: [shape.shape(image, ((SIDE, SIDE),)) for image in decoded])
    moments = np.random.default_rng(0).standard_normal((32, 32, 8)).astype(records.DTYPE)

    def write() -> list[Any]:
        writer = ArrayRecordWriter(str(folder / "out.array_record"), encode.WRITER_OPTIONS)
        for sample, image in zip(samples, shaped, strict=True):
            record = encode.to_record(encode.Ready(sample, image), moments, ("aesthetic",))
            writer.write(records.encode(record))
        writer.close()
        return samples

    timed("write", write)
    return rates


def encode_rate(count: int) -> tuple[float, float]:
    """Images per second through SDXL's encoder, one batch, without compilation; FLOPs of an image, as XLA counts."""
    codec = create_codec("vae", weights="random")
    params = jax.jit(lambda key: trees.unbox(codec.init(key)))(jax.random.key(0))
    encoder = encode.Encoder(codec, params, count)
    pixels = list(np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8))
    encoder(pixels).block_until_ready()
    start = time.perf_counter()
    encoder(pixels).block_until_ready()
    rate = count / (time.perf_counter() - start)
    one = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.uint8)
    return rate, jax.jit(codec.moments).lower(params, one).cost_analysis()["flops"]


def note(args: argparse.Namespace, rates: dict[str, float], flops: float) -> str:
    """The markdown."""
    host = 1 / sum(1 / rate for name, rate in rates.items() if name != "encode")
    chips = V5P_PEAK * CHIPS * UTILISATION / flops
    threads = chips / (CHIPS / 4) / host
    lines = [
        *header("Preparing images, stage by stage", "benchmarks/prepare.py"),
        "",
        f"{args.images:,} JPEG files of {RAW_SIDE} x {RAW_SIDE} px in one tar, resized to {SIDE} px, each stage in one "
        f"thread; SDXL's autoencoder in float32 on a batch of {args.encoded}, on all cores. Load average "
        f"at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "| stage | images/s |",
        "|---|---|",
        *(f"| {name} | {rate:,.1f} |" for name, rate in rates.items()),
        f"| all but encode, one thread | {host:,.0f} |",
        "",
        "## What this implies for a v5p-128 (on paper)",
        "",
        f"At {UTILISATION:.0%} of {V5P_PEAK / 1e12:.0f} TFLOP/s, assumed, {CHIPS} chips encode {chips:,.0f} images a "
        f"second ({flops / 1e9:.0f} GFLOP each): 600 million in {600e6 / chips / 3600:.1f} hours. To keep "
        f"up, each of the {CHIPS // 4} hosts decodes {chips / (CHIPS / 4):,.0f} images a second, which at the rate "
        f"above takes {threads:.0f} threads. Training at batch {BATCH} and {STEPS_PER_SECOND} steps a second takes "
        f"{BATCH * STEPS_PER_SECOND:,} images a second; to encode them in the step would take "
        f"{BATCH * STEPS_PER_SECOND / chips:.0%} of the slice's time.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
