"""Checksums: what they are, that no layout changes them, that every changed bit does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling_dit.checkpoints.checksums import Sealed, checksums
from scaling_dit.parallel.mesh import make_mesh

ARRAY = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)


def sum_of(array) -> str:
    return checksums({"it": array})["it"]


def by_hand(words: np.ndarray) -> str:
    """The definition, in Python's integers; `words` in the order of the array."""
    totals = [0, 0]
    for place, word in enumerate(words.reshape(-1).tolist(), start=1):
        mixed = []
        for seed in (0x9E3779B9, 0x85EBCA77):
            x = word ^ (place * seed % 2**32)
            x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
            x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
            mixed.append(x ^ x >> 16)
        totals[0] += mixed[0]
        totals[1] += 3 * mixed[1] + mixed[0]
    return "".join(f"{total % 2**32:08x}" for total in totals)


@pytest.mark.parametrize(
    "array, words",
    [
        (ARRAY, ARRAY.view(np.uint32)),
        (ARRAY.astype(jnp.bfloat16), ARRAY.astype(jnp.bfloat16).view(np.uint16)),
        (np.array([True, False, True]), np.array([1, 0, 1], np.uint32)),
        (np.int32(-3), np.array([2**32 - 3], np.uint32)),
        (np.zeros((0, 4), np.float32), np.zeros(0, np.uint32)),
    ],
    ids=["float32", "bfloat16", "bool", "scalar", "empty"],
)
def test_a_checksum_is_what_its_definition_says(array, words):
    assert sum_of(array) == by_hand(words)


@pytest.mark.parametrize(
    "spec",
    [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "fsdp"), PartitionSpec("data", "fsdp")],
)
def test_no_sharding_changes_it(spec):
    mesh = make_mesh(data=4, fsdp=2)
    assert sum_of(jax.device_put(ARRAY, NamedSharding(mesh, spec))) == by_hand(ARRAY.view(np.uint32))


def test_every_single_bit_counts():
    words, seen = ARRAY.view(np.uint32), set()
    for bit in range(32):
        changed = words.copy()
        changed[bit % 8, bit % 24] ^= np.uint32(1 << bit)
        seen.add(sum_of(changed.view(np.float32)))
    assert len(seen) == 32 and sum_of(ARRAY) not in seen


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.roll(a, 1, axis=0),
        lambda a: a[:, ::-1],
        lambda a: np.where(np.arange(24) < 2, -a, a),
        lambda a: np.where(a == a.max(), np.nan, a),
        lambda a: np.zeros_like(a),
    ],
    ids=["rolled", "turned", "two signs a row", "one nan", "zeros"],
)
def test_larger_damage_shows(change):
    assert sum_of(np.ascontiguousarray(change(ARRAY))) != sum_of(ARRAY)


SEALED = Sealed({"rewinds": 2}, {"a/b": ("float32[8, 24]", "0123456789abcdef")})


def test_what_is_sealed_is_read_back():
    assert Sealed.from_json(SEALED.to_json()) == SEALED


def test_a_checkpoint_of_an_older_version_has_no_checksums():
    assert Sealed.from_json({"rewinds": 2, "losses": []}) == Sealed({"rewinds": 2, "losses": []}, None)


@pytest.mark.parametrize("key", ["extra", "arrays", "sha256"])
@pytest.mark.parametrize("change", ["renamed", "removed", "changed"])
def test_every_change_of_what_is_sealed_is_found(key, change):
    saved = SEALED.to_json()
    value = saved.pop(key)
    if change == "renamed":
        saved[key + "x"] = value
    elif change == "changed":
        saved[key] = {"rewinds": 3} if key == "extra" else {} if key == "arrays" else "0"
    with pytest.raises(ValueError, match="have changed since"):
        Sealed.from_json(saved)


@pytest.mark.parametrize("saved", [[], None, 3, "extra"])
def test_what_is_no_object_is_damage(saved):
    with pytest.raises(ValueError, match="no JSON object"):
        Sealed.from_json(saved)
