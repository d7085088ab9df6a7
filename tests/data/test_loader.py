"""What a loader yields depends on the seed, the step and the positions asked for, and on nothing else."""

import os
import runpy
import socket
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_dit.data.captions import choose_caption
from scaling_dit.data.loader import KeyedGenerator, make_loader
from scaling_dit.errors import UserError
from tests.support import xla
from tests.support.paths import SUPPORT

SIZE = 4
PARAPHRASES = 5


class Numbers:
    """Record i has i, modulo 2**24, written in its pixels and captions "i.0" ... "i.4"."""

    image_size = SIZE

    def __init__(self, length):
        self.length = length
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, index, /):
        self.reads.append(index)
        digits = index // 256 ** np.arange(3)
        image = np.broadcast_to((digits % 256).astype(np.uint8), (SIZE, SIZE, 3))
        captions = [f"{index % 2**24}.{k}" for k in range(PARAPHRASES)]
        return {"image": image, "captions": captions, "key": str(index)}

    def describe(self):
        return f"{self.length} numbers"

    def held_out(self):
        return self


def tokenize(captions):
    """Captions "index.paraphrase" -> ids [B, 2]."""
    ids = np.array([caption.split(".") for caption in captions], np.int32)
    return ids, np.ones(ids.shape, bool)


def load(source, steps, *, batch=8, seed=3, positions=None, **options):
    positions = np.arange(batch) if positions is None else positions
    iterator = make_loader(source, tokenize, batch=batch, seed=seed, positions=positions, **options)
    batches = [next(iterator) for _ in range(steps)]
    iterator.close()
    return batches


def indices(batch):
    """Which records a batch holds, read from its pixels."""
    return batch["images"][:, 0, 0, :].astype(np.int64) @ 256 ** np.arange(3)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for key in ("images", "ids", "mask"):
            np.testing.assert_array_equal(a[key], b[key])


def test_contents_and_types():
    (batch,) = load(Numbers(1000), 1)
    assert batch["images"].shape == (8, SIZE, SIZE, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["ids"].dtype == np.int32
    assert batch["mask"].dtype == bool
    # Each caption stands beside its own image.
    np.testing.assert_array_equal(batch["ids"][:, 0], indices(batch))


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (12, 4), (5, 16), (1, 3), (97, 8)])
def test_each_epoch_is_a_fresh_permutation(length, batch):
    epochs = 4
    steps = -(-epochs * length // batch)
    order = np.concatenate([indices(b) for b in load(Numbers(length), steps, batch=batch)])
    order = order[: epochs * length].reshape(epochs, length)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(length), (epochs, 1)))
    if length > 4:
        assert len({tuple(epoch) for epoch in order}) == epochs


def test_the_order_is_that_of_the_flat_index():
    by_four = np.concatenate([indices(b) for b in load(Numbers(50), 6, batch=4)])
    by_twelve = np.concatenate([indices(b) for b in load(Numbers(50), 2, batch=12)])
    np.testing.assert_array_equal(by_four, by_twelve)


def test_rows_come_in_the_order_of_positions():
    whole = load(Numbers(100), 3)
    positions = [6, 1, 7, 2]
    expected = [{key: rows[positions] for key, rows in batch.items()} for batch in whole]
    assert_equal(load(Numbers(100), 3, positions=positions), expected)


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(8)), cuts=st.sets(st.integers(1, 7), max_size=3), step=st.integers(0, 10**9)
)
def test_any_split_of_positions_gives_the_same_rows(order, cuts, step):
    (whole,) = load(Numbers(100), 1, start_step=step, threads=0, prefetch=0)
    for part in np.split(np.array(order), sorted(cuts)):
        (mine,) = load(Numbers(100), 1, positions=part, start_step=step, threads=0, prefetch=0)
        assert_equal([mine], [{key: rows[part] for key, rows in whole.items()}])


def test_resume_equals_uninterrupted_and_reads_nothing_before():
    whole = load(Numbers(30), 9)
    source = Numbers(30)
    resumed = load(source, 4, start_step=5, threads=0, prefetch=0)
    assert_equal(resumed, whole[5:])
    assert len(source.reads) == 4 * 8


def test_seed_decides_order_and_captions():
    assert_equal(load(Numbers(100), 3), load(Numbers(100), 3))
    other = load(Numbers(100), 3, seed=4)
    assert not np.array_equal(indices(load(Numbers(100), 1)[0]), indices(other[0]))
    # One record: only the captions can differ.
    single = [load(Numbers(1), 20, seed=seed) for seed in (0, 1)]
    assert not np.array_equal(single[0][0]["ids"], single[1][0]["ids"])


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 1), (4, 8)])
def test_threads_and_read_ahead_change_nothing(threads, prefetch):
    expected = load(Numbers(40), 12, threads=2, prefetch=3)
    assert_equal(load(Numbers(40), 12, threads=threads, prefetch=prefetch), expected)


def test_reading_and_tokenising_run_in_background_threads():
    names = set()

    def spy(captions):
        names.add(threading.current_thread() is threading.main_thread())
        return tokenize(captions)

    iterator = make_loader(Numbers(10), spy, batch=4, seed=0, positions=range(4), threads=2, prefetch=2)
    for _ in range(4):
        next(iterator)
    iterator.close()
    assert names == {False}


def test_captions_are_uniform_and_change_from_epoch_to_epoch():
    # Every step is an epoch.
    batches = load(Numbers(250), 24, batch=250)
    chosen = np.stack([batch["ids"][:, 1] for batch in batches])
    counts = np.bincount(chosen.ravel(), minlength=PARAPHRASES)
    assert counts.min() > 0.9 * chosen.size / PARAPHRASES
    of_one_record = chosen[np.stack([indices(batch) for batch in batches]) == 0]
    assert len(set(of_one_record.tolist())) == PARAPHRASES
    # Neighbouring positions and steps are independent: equal about one time in five.
    for a, b in ((chosen[:, 1:], chosen[:, :-1]), (chosen[1:], chosen[:-1])):
        assert np.mean(a == b) == pytest.approx(1 / PARAPHRASES, abs=0.03)


def test_a_long_source_costs_no_memory():
    source = Numbers(2**40)
    # Imports and caches.
    load(Numbers(100), 1)
    tracemalloc.start()
    (batch,) = load(source, 1, batch=4, start_step=10**9, threads=0, prefetch=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    # The whole range is drawn from, not its first 32 bits.
    assert max(source.reads) > 2**32
    assert len(batch["ids"]) == 4


def test_errors_name_what_is_wrong():
    with pytest.raises(UserError, match="no examples: 0 numbers"):
        load(Numbers(0), 1)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed is {seed}"):
            load(Numbers(5), 1, seed=seed)
    for positions in ([0, 8], [-1], [], [[0, 1]]):
        with pytest.raises(ValueError, match=r"rows in \[0, 8\)"):
            load(Numbers(5), 1, positions=positions)


def test_an_error_in_a_reading_thread_reaches_the_caller():
    class Odd(Numbers):
        def __getitem__(self, index, /):
            record = super().__getitem__(index)
            return {**record, "image": record["image"][:3]}

    with pytest.raises(
        UserError, match="has an image of 3x4x3 uint8; the source promises 4x4x3 uint8"
    ) as error:
        load(Odd(5), 1)
    assert "\n" not in str(error.value)


def test_choose_caption_reads_only_the_chosen_one():
    class Lazy:
        asked = ()

        def __len__(self):
            return 7

        def __getitem__(self, index):
            self.asked += (index,)
            return str(index)

    lazy = Lazy()
    chosen = choose_caption(lazy, np.random.default_rng(0))
    assert lazy.asked == (int(chosen),)
    for wrong in ("a lone text", []):
        with pytest.raises(UserError, match="must be a list"):
            choose_caption(wrong, np.random.default_rng(0))


def test_keyed_generator_is_philox_at_that_counter():
    keyed = KeyedGenerator(5)
    # Leaves half-used buffers behind.
    first = keyed.at(7, 11).integers(2**60, size=9)
    keyed.at(7, 12).integers(100, dtype=np.int32)
    np.testing.assert_array_equal(keyed.at(7, 11).integers(2**60, size=9), first)
    fresh = np.random.Generator(np.random.Philox(key=5, counter=(7 << 192) | (11 << 128)))
    np.testing.assert_array_equal(fresh.integers(2**60, size=9), first)
    assert not np.array_equal(keyed.at(11, 7).integers(2**60, size=9), first)


# Real processes. Each writes the rows of its positions; together they must hold what this process reads alone.
WORKER = SUPPORT / "loader_worker.py"


def assert_processes_read_the_same(folder, processes, address=""):
    """Runs the processes, puts their rows together and compares them with what one process reads."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(devices=2),
    }
    outs = [folder / f"{processes}-{process}.npz" for process in range(processes)]
    commands = [[str(i), str(processes), str(out), address] for i, out in enumerate(outs)]
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *command], env=environment, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in running:
            process.kill()
    parts = [dict(np.load(out)) for out in outs]
    positions = np.concatenate([part.pop("positions") for part in parts])
    worker = runpy.run_path(str(WORKER))
    rows = np.arange(worker["BATCH"])
    # Each row is read by one process.
    np.testing.assert_array_equal(np.sort(positions), rows)
    for key, expected in worker["read"](rows).items():
        found = np.concatenate([part[key] for part in parts], axis=1)[:, np.argsort(positions)]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_read_what_one_reads(tmp_path, processes):
    assert_processes_read_the_same(tmp_path, processes)


@pytest.mark.slow
def test_a_distributed_job_reads_what_one_process_reads(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    assert_processes_read_the_same(tmp_path, 2, f"localhost:{port}")


@pytest.mark.parametrize("length", [2, 3])
def test_orders_of_few_records_are_uniform(length):
    epochs = 1200
    order = np.concatenate([indices(b) for b in load(Numbers(length), length, batch=epochs, threads=0)])
    _, counts = np.unique(order.reshape(epochs, length), axis=0, return_counts=True)
    assert len(counts) == [2, 6][length - 2]
    expected = epochs / len(counts)
    assert (np.abs(counts - expected) < 3.5 * expected**0.5).all()
