"""Samples a second that one process loads from a prepared set: reads moments, chooses and tokenises captions.

    python benchmarks/loader.py --note=benchmarks/loader_cpu.md

Writes a set of records as SDXL's autoencoder gives them at 256 px (32 x 32 x 8 moments in bfloat16, 16 KiB each) with
alt-text and five synthetic captions, then reads batches of 2048 in the shuffled order of training. CLIP's tokenizer
needs its vocabulary, which comes with the open_clip_torch wheel. The set fits into memory, so the benchmark measures
the processor's work and not the disk. The parts are timed one after the other in one thread.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from note import header

from scaling_dit import encoders, files
from scaling_dit.curation import encode
from scaling_dit.data.captions import CaptionPolicy
from scaling_dit.data.loader import KeyedGenerator, make_loader, stack_images
from scaling_dit.data.prepared import manifest, records
from scaling_dit.data.sources import create_source
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.monitor.host import cores

SHAPE = (32, 32, 8)
SHARDS = 8
BATCH = 2048
POLICY = CaptionPolicy(policy="mix", alt=0.5, synthetic=0.5)
# A v5p-128 slice has 64 chips, four to a host.
V5P_128_HOSTS = 16


def main() -> None:
    """Measures and writes the note."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", type=pathlib.Path, required=True, help="markdown file to write")
    parser.add_argument("--records", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=24, help="batches of each measurement")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_set(pathlib.Path(folder), args.records)
        source = create_source(f"latents:{folder}", image_size=256)
        tokenize = clip_tokenizer()
        whole = {threads: loader_rate(source, tokenize, args.steps, threads) for threads in (0, 1, 2, 4)}
        parts = part_times(source, tokenize, args.steps)
    args.note.write_text(note(args, whole, parts))


def write_set(folder: pathlib.Path, count: int) -> None:
    """A prepared set without an autoencoder: normal moments, captions of shapes."""
    rng = np.random.default_rng(0)
    source = create_source("shapes", preset="free32", paraphrases=6)
    captions = [tuple(source[i]["captions"]) for i in range(512)]
    kinds = ("alt", *["synthetic"] * 5)
    (folder / manifest.SHARDS).mkdir()
    shards = []
    for number, share in enumerate(np.array_split(np.arange(count), SHARDS)):
        file = f"{manifest.SHARDS}/{number:05d}.train.array_record"
        writer = ArrayRecordWriter(str(folder / file), encode.WRITER_OPTIONS)
        for i in share:
            moments = rng.standard_normal(SHAPE, np.float32).astype(ml_dtypes.bfloat16)
            record = records.Prepared(
                moments, f"{i:09d}", captions[i % 512], kinds, 512, 512, (0, 0, 512, 512), {}
            )
            writer.write(records.encode(record))
        writer.close()
        path = folder / file
        shards.append(
            manifest.Shard(file, "train", (256, 256), len(share), path.stat().st_size, files.sha256(path))
        )
    part = manifest.Part("made", count, tuple(shards), {}, [])
    made = manifest.merge([part], codec={}, image_size=256, moments={"256x256": SHAPE}, request={})
    (folder / manifest.MANIFEST).write_text(made.to_json())


def clip_tokenizer() -> Callable[[list[str]], Any]:
    """Captions -> ids, mask [B, 77], with the vocabulary in the open_clip_torch wheel."""
    # Where `make test` puts it.
    sys.path.append(str(pathlib.Path(sys.prefix) / "references"))
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(
            "CLIP's vocabulary comes with open_clip_torch, which `make test` fetches: "
            "pip install --no-deps --target=.venv/references open_clip_torch"
        )
    path = pathlib.Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    tokenizer = SubwordTokenizer.read({"tokenizer_files": str(path)})
    encoder = encoders.create_text_encoder("clip", tokenizer=tokenizer, weights="random")
    return encoder.tokenize


def loader_rate(source: Any, tokenize: Any, steps: int, threads: int) -> float:
    """Samples per second of the loader, from the batch after the first."""
    loader = make_loader(
        source, tokenize, batch=BATCH, seed=0, positions=range(BATCH), captions=POLICY,
        threads=threads, prefetch=2 * threads,
    )  # fmt: skip
    # Skip the batches that were read ahead.
    for _ in range(1 + 2 * threads):
        next(loader)
    start = time.perf_counter()
    for _ in range(steps):
        next(loader)
    seconds = time.perf_counter() - start
    loader.close()
    return steps * BATCH / seconds


def part_times(source: Any, tokenize: Any, steps: int) -> dict[str, float]:
    """Microseconds per sample of each part of a batch, in one thread."""
    order = grain.MapDataset.range(len(source)).seed(0).shuffle().repeat()
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    keyed = KeyedGenerator(0)
    for step in range(steps):
        indices = timed("order", lambda step=step: [order[step * BATCH + p] for p in range(BATCH)])
        found = timed("read and decode", lambda indices=indices: source.__getitems__(indices))
        captions = timed(
            "choose captions",
            lambda step=step, found=found: [
                POLICY.choose(record, keyed.at(step, p)) for p, record in enumerate(found)
            ],
        )
        timed("tokenise", lambda captions=captions: tokenize(captions))
        timed("stack", lambda found=found: stack_images(found))
    return {name: seconds / (steps * BATCH) * 1e6 for name, seconds in spent.items()}


def note(args: argparse.Namespace, whole: dict[int, float], parts: dict[str, float]) -> str:
    """The markdown."""
    best = max(whole.values())
    total = sum(parts.values())
    lines = [
        *header("Loading prepared latents", "benchmarks/loader.py"),
        "",
        f"{args.records:,} records of 32 x 32 x 8 moments in bfloat16 (16 KiB) with six captions, in {SHARDS} shards, "
        f"in memory; batches of {BATCH}, CLIP tokens [77], {args.steps} batches a measurement; one process. "
        f"Load average at the end: {os.getloadavg()[0]:.1f}.",
        "",
        "| reading threads | samples/s |",
        "|---|---|",
        *(f"| {threads or '0 (the caller)'} | {rate:,.0f} |" for threads, rate in whole.items()),
        "",
        "One thread, part by part:",
        "",
        "| part | microseconds a sample | share |",
        "|---|---|---|",
        *(f"| {name} | {micros:.1f} | {micros / total:.0%} |" for name, micros in parts.items()),
        "",
        "## What this implies for a v5p-128 at batch 2048 (on paper)",
        "",
        f"A v5p-128 slice has {V5P_128_HOSTS} hosts, so a process reads {BATCH // V5P_128_HOSTS} rows of a batch. At "
        f"the best rate above it makes {best / (BATCH / V5P_128_HOSTS):.0f} shares of a batch a second on "
        f"{len(cores())} cores; training takes a few a second. The network carries "
        f"{BATCH / V5P_128_HOSTS * 16.4e-3:.1f} MB to each host a step: records of 16.4 KB.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
