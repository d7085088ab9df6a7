"""A prepared set as a source: what is read is what was written, and nothing that is damaged goes by unseen."""

import json
import os
import runpy
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from scaling_dit import config as config_lib
from scaling_dit import files
from scaling_dit.data.buckets import open_buckets
from scaling_dit.data.loader import make_loader
from scaling_dit.data.prepared import manifest, records
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from scaling_dit.model.build import make_tokenizer, open_source
from tests.support import fake_store
from tests.support.paths import SUPPORT
from tests.support.prepared_records import CODEC, SHAPE, SIZE, assert_is, prepared, write_set


@pytest.fixture(scope="module")
def a_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return folder, write_set(folder)


@pytest.fixture
def own_set(tmp_path):
    """One to spoil."""
    write_set(tmp_path / "set")
    return tmp_path / "set"


def open_set(folder, **fields):
    return create_source(f"latents:{folder}", image_size=16, **fields)


def test_a_record_comes_back_as_it_was_and_has_one_encoding():
    record = prepared(3)._replace(captions=("Größe \u2028 \U0001f40d", ""), columns={"b": None, "a": [1.5]})
    data = records.encode(record)
    found = records.decode(data)
    np.testing.assert_array_equal(found.moments, record.moments)
    assert found._replace(moments=None) == record._replace(moments=None)
    assert records.encode(record._replace(columns={"a": [1.5], "b": None})) == data
    # The layout that the module states, read by hand.
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert data[:4] == b"SDL1" and header["shape"] == [2, 2, 6] and header["width"] == 40
    floats = np.frombuffer(data[8 + size :], np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(floats.view(np.float32), record.moments.astype(np.float32).ravel())


@pytest.mark.parametrize(
    "data", [b"", b"SDL2" + bytes(40), records.encode(prepared(1))[:-1], b"SDL1\x02\0\0\0{}"]
)
def test_bytes_that_are_no_record_are_refused(data):
    with pytest.raises((ValueError, KeyError)):
        records.decode(data)


def test_moments_of_another_type_are_not_written():
    with pytest.raises(ValueError, match="must be bfloat16"):
        records.encode(prepared(1)._replace(moments=np.zeros(SHAPE, np.float32)))


def test_every_record_of_both_splits_by_its_number(a_set):
    folder, numbers = a_set
    source = open_set(folder)
    held_out = source.held_out()
    assert (len(source), len(held_out)) == (23, 6)
    for split, of_split in ((source, numbers["train"]), (held_out, numbers["held_out"])):
        for index, number in enumerate(of_split):
            assert_is(split[index], number)
    assert source.moments_shape == SHAPE
    assert "23 records of 2x2x6, train split" in source.describe()
    assert list(held_out.texts())[:2] == ["picture 7, told 0", "picture 7, told 1"]
    for index in (-1, 23):
        with pytest.raises(IndexError):
            source[index]


def test_many_at_once_are_those_one_by_one(a_set):
    folder, numbers = a_set
    wanted = np.random.default_rng(0).integers(0, 23, 200)
    found = open_set(folder).__getitems__(wanted.tolist())
    assert len(found) == 200
    for record, index in zip(found, wanted, strict=True):
        assert_is(record, numbers["train"][index])
    assert open_set(folder).__getitems__([]) == []


def test_threads_share_a_source(a_set):
    folder, numbers = a_set
    source, found = open_set(folder), {}

    def read(offset):
        found[offset] = source.__getitems__([(offset + k) % 23 for k in range(100)])

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for offset, batch in found.items():
        for k, record in enumerate(batch):
            assert_is(record, numbers["train"][(offset + k) % 23])


def test_batches_hold_moments_and_the_captions_beside_them(a_set):
    folder, _ = a_set

    def tokenize(captions):
        return np.array([[int(c.split()[1].strip(","))] for c in captions], np.int32), np.ones(
            (len(captions), 1), bool
        )

    batch = next(make_loader(open_set(folder), tokenize, batch=16, seed=0, positions=range(16), threads=0))
    assert set(batch) == {"latents", "ids", "mask"}
    assert batch["latents"].shape == (16, *SHAPE) and batch["latents"].dtype == ml_dtypes.bfloat16
    for row, number in zip(batch["latents"], batch["ids"][:, 0], strict=True):
        np.testing.assert_array_equal(row, prepared(int(number)).moments)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_record_is_counted_and_another_stands_in(own_set):
    path = own_set / manifest.SHARDS / "00000.train.array_record"
    flip(path, path.read_bytes().index(b"picture 4,"))
    source = open_set(own_set, max_damaged=1)
    alone, batch = source[4], source.__getitems__([3, 4, 5])
    # Depends on the index alone.
    assert alone["key"] == batch[1]["key"] != "key/4"
    assert [batch[0]["key"], batch[2]["key"]] == ["key/3", "key/5"]
    assert source.damage.counts() == {"damaged_record": 1}
    (fault,) = source.damage.examples("damaged_record")
    assert fault.where == f"{path} record 4"
    with pytest.raises(
        UserError, match=r"record 4: .*; to replace up to N damaged records by others, set"
    ) as error:
        open_set(own_set).__getitems__([3, 4, 5])
    assert "\n" not in str(error.value)


def test_a_flipped_byte_is_found_by_its_checksum_at_opening(own_set):
    path = own_set / manifest.SHARDS / "00003.held_out.array_record"
    flip(path, path.stat().st_size // 2)
    assert len(open_set(own_set)) == 23
    with pytest.raises(UserError, match=r"00003\.held_out\.array_record has another checksum") as error:
        open_set(own_set, verify=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes; its manifest says"),
    ],
)
def test_a_shard_that_is_not_the_manifest_s_stops_at_opening(own_set, spoil, message):
    spoil(own_set / manifest.SHARDS / "00001.held_out.array_record")
    with pytest.raises(UserError, match=rf"00001\.held_out\.array_record .*{message}") as error:
        open_set(own_set)
    assert "\n" not in str(error.value)


def test_a_shard_of_another_number_of_records_is_told(own_set):
    path = own_set / manifest.MANIFEST
    path.write_text(path.read_text().replace('"records": 11', '"records": 12'))
    with pytest.raises(UserError, match="holds 11 records; its manifest says 12"):
        open_set(own_set)[20]


def test_folders_that_are_no_finished_set(own_set, tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing; `prepare` writes one"):
        open_set(tmp_path)
    (own_set / manifest.REQUEST).write_text("{}")
    text = (own_set / manifest.MANIFEST).read_text()
    (own_set / manifest.MANIFEST).unlink()
    with pytest.raises(UserError, match="not finished"):
        open_set(own_set)
    (own_set / manifest.MANIFEST).write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="is of format 9; this version reads 1"):
        open_set(own_set)
    (own_set / manifest.MANIFEST).write_text(text[:-30])
    with pytest.raises(UserError, match="is damaged"):
        open_set(own_set)


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("codec", "vae", "codec is no object"),
        ("moments", [16], "moments is no object"),
        ("shards", [{"records": "11"}], "file, records and bytes"),
        ("shards", [{"extra": 1}], "unexpected keyword"),
    ],
)
def test_a_manifest_edited_by_hand_is_told_in_one_line(own_set, key, value, told):
    path = own_set / manifest.MANIFEST
    fields = json.loads(path.read_text())
    fields[key] = [fields["shards"][0] | value[0]] if key == "shards" else value
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=f"manifest.json is damaged .*{told}") as error:
        open_set(own_set)
    assert "\n" not in str(error.value)


def test_another_image_size_or_no_records(own_set):
    with pytest.raises(UserError, match=r"holds no images of 256x256 px; it holds 16x16"):
        create_source(f"latents:{own_set}")
    with pytest.raises(UserError, match="must be 0 or more"):
        open_set(own_set, max_damaged=-1)
    write_set(own_set.parent / "all_train", counts=((3, 0),))
    with pytest.raises(UserError, match="no records in the held_out split"):
        open_set(own_set.parent / "all_train").held_out()


def write_buckets(folder, sizes):
    """A set with one training record of each size and one square one held out; record n is of size n."""
    (folder / manifest.SHARDS).mkdir(parents=True)
    shards, moments = [], {manifest.size_name(size): (2, 2, 6) for size in [*sizes, SIZE]}
    for number, (size, split) in enumerate([*((size, "train") for size in sizes), (SIZE, "held_out")]):
        file = f"{manifest.SHARDS}/00000.{number}.{split}.array_record"
        writer = ArrayRecordWriter(str(folder / file), "group_size:1")
        writer.write(records.encode(prepared(number)))
        writer.close()
        path = folder / file
        shards.append(manifest.Shard(file, split, size, 1, path.stat().st_size, files.sha256(path)))
    part = manifest.Part("00000.tar", len(shards), tuple(shards), {}, [])
    made = manifest.merge([part], codec=CODEC, image_size=16, moments=moments, request={})
    (folder / manifest.MANIFEST).write_text(made.to_json())


def config_of(folder, buckets):
    fields = [f"--config.source.name=latents:{folder}", "--config.source.image_size=16"]
    return config_lib.load("experiments/shapes.py:smoke", [*fields, f"--config.buckets={buckets}"])


def test_a_tokenizer_has_the_words_of_all_buckets_that_a_run_trains_on(tmp_path):
    write_buckets(tmp_path / "set", [SIZE, (12, 20), (20, 12)])
    words = {buckets: make_tokenizer(config_of(tmp_path / "set", buckets)).words for buckets in (False, True)}
    assert {"0"} == {word for word in words[False] if word.isdecimal()}
    assert {"0", "1", "2"} == {word for word in words[True] if word.isdecimal()}


def test_a_set_without_squares_trains_with_buckets_alone(tmp_path):
    write_buckets(tmp_path / "set", [(12, 20), (20, 12)])
    source = open_source(config_of(tmp_path / "set", True))
    assert [bucket.bucket_size for bucket in open_buckets(source)] == [(12, 20), (20, 12)]
    assert len(source.held_out()) == 1
    with pytest.raises(
        UserError, match=r"no records to train on: .*\(2 of other sizes, for config.buckets=True"
    ):
        open_source(config_of(tmp_path / "set", False))
    with pytest.raises(UserError, match="no records in the train split"):
        write_set(tmp_path / "none", counts=((0, 2),))
        open_set(tmp_path / "none")


def test_a_remote_set_reads_the_same(own_set, tmp_path, monkeypatch):
    store = fake_store.install(monkeypatch, tmp_path)
    assert epath.Path("s3://set/manifest.json").exists()
    source = create_source("latents:s3://set", image_size=16)
    for a, b in zip(source.__getitems__(range(23)), open_set(own_set).__getitems__(range(23)), strict=True):
        assert a["key"] == b["key"]
        np.testing.assert_array_equal(a["latents"], b["latents"])
    assert not store.refused


WORKER = SUPPORT / "latents_worker.py"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_read_what_one_reads_and_a_resume_goes_on(a_set, tmp_path, processes):
    """Each real process reads the positions it holds; from step 3 on it is a loader that starts there."""
    folder, _ = a_set
    worker = runpy.run_path(str(WORKER))
    whole = worker["read"](str(folder), np.arange(worker["BATCH"]), start=0)
    later = worker["read"](str(folder), np.arange(worker["BATCH"]), start=3)
    for key, steps in later.items():
        np.testing.assert_array_equal(steps[:2], whole[key][3:5])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
    }
    outs = [tmp_path / f"{i}.npz" for i in range(processes)]
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(i), str(processes), str(out)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for i, out in enumerate(outs)
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    parts = [dict(np.load(out)) for out in outs]
    positions = np.concatenate([part.pop("positions") for part in parts])
    for key, expected in whole.items():
        found = np.concatenate([part[key] for part in parts], axis=1)[:, np.argsort(positions)]
        np.testing.assert_array_equal(found, expected)
