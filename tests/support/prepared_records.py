"""Prepared sets of numbered records, written without `prepare`."""

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from scaling_dit import files
from scaling_dit.data.prepared import manifest, records

SHAPE = (2, 2, 6)
SIZE = (16, 16)
CODEC = {"name": "dct", "patch": 8, "channels": 6, "scale": 2.5, "sha256": ""}


def prepared(number, shape=SHAPE):
    """Record `number`: moments that no two records share, one or two captions."""
    moments = np.random.default_rng(number).standard_normal(shape).astype(ml_dtypes.bfloat16)
    captions = tuple(f"picture {number}, told {k}" for k in range(1 + number % 2))
    kinds = ("alt", "synthetic")[: len(captions)]
    return records.Prepared(
        moments, f"key/{number}", captions, kinds, 40, 30, (5.0, 0.0, 35.0, 30.0), {"a": number}
    )


def write_set(folder, counts=((7, 2), (0, 3), (5, 0), (11, 1)), shape=SHAPE):
    """A finished set of (train, held-out) records for each part; returns the numbers of each split, in order."""
    numbers, parts, number = {"train": [], "held_out": []}, [], 0
    (folder / manifest.SHARDS).mkdir(parents=True)
    for part, both in enumerate(counts):
        shards = []
        for split, count in zip(manifest.SPLITS, both, strict=True):
            if not count:
                continue
            file = f"{manifest.SHARDS}/{part:05d}.{split}.array_record"
            writer = ArrayRecordWriter(str(folder / file), "group_size:1")
            for _ in range(count):
                writer.write(records.encode(prepared(number, shape)))
                numbers[split].append(number)
                number += 1
            writer.close()
            path = folder / file
            shards.append(manifest.Shard(file, split, SIZE, count, path.stat().st_size, files.sha256(path)))
        parts.append(manifest.Part(f"{part:05d}.tar", sum(both), tuple(shards), {}, []))
    made = manifest.merge(parts, codec=CODEC, image_size=16, moments={"16x16": shape}, request={})
    (folder / manifest.MANIFEST).write_text(made.to_json())
    return numbers


def assert_is(record, number):
    expected = prepared(number)
    assert record["key"] == expected.key
    assert record["captions"] == expected.captions
    assert record["kinds"] == expected.kinds
    assert record["latents"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(record["latents"], expected.moments)
