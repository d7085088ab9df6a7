"""Images in shards and in files: the same bits from any number of processes, with any kills between."""

import json
import tarfile

import numpy as np
import pytest
from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.parallel.mesh import make_mesh
from scaling_dit.sampling import shards
from scaling_dit.sampling.folder import Images
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.sampling.shards import read_shard, write_shard

SIDE, COUNT = 4, 23


class Sampler:
    """Images that depend on seed, number and prompt; notes what it was asked for and dies at some call."""

    def __init__(self, dies_at=None):
        self.options = SamplingOptions(batch=4)
        self.asked, self.calls, self._dies_at = [], 0, dies_at

    def __call__(self, params, frozen, prompts, seed, numbers, batch):
        assert batch == 8 and len(prompts) <= 4
        self.calls += 1
        if self.calls == self._dies_at:
            raise KeyboardInterrupt
        self.asked += numbers
        pairs = zip(numbers, prompts, strict=True)
        return np.stack([np.random.default_rng([seed, i, len(p)]).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                         for i, p in pairs])  # fmt: skip


class Pipe:
    # Eight devices, so a compiled batch of eight.
    params = frozen = None
    mesh = make_mesh()


ITEMS = [(f"p{i}", f"prompt {'x' * i}\u2028") for i in range(COUNT)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("scaling_dit.sampling.folder.SHARD", 8)


def request(folder, store, seed=1):
    return Images.of(ITEMS, epath.Path(folder), seed=seed, about={"step": 4}, store=store)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("store", shards.STORES)
def test_processes_and_kills_change_no_byte(tmp_path, store):
    whole = request(tmp_path / "whole", store)
    whole.make(Sampler(), Pipe, 1, share=(0, 1))
    whole.finish()
    images = np.concatenate(list(whole.read(range(COUNT), 5)))
    assert images.shape == (COUNT, SIDE, SIDE, 3)

    parts = request(tmp_path / "parts", store)
    asked = []
    for index in (2, 0, 1):
        sampler = Sampler()
        parts.make(sampler, Pipe, 1, share=(index, 3))
        asked += sampler.asked
    assert sorted(asked) == list(range(COUNT))
    parts.finish()
    assert content(tmp_path / "parts") == content(tmp_path / "whole")

    killed = request(tmp_path / "killed", store)
    for dies_at in (2, 4, None):
        sampler = Sampler(dies_at)
        try:
            killed.make(sampler, Pipe, 1, share=(0, 1))
        except KeyboardInterrupt:
            assert dies_at
    killed.finish()
    assert len(sampler.asked) < COUNT
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    again = Sampler()
    killed.make(again, Pipe, 1, share=(0, 1))
    assert not again.asked


def test_stores_hold_the_same_images(tmp_path):
    found = []
    for store in shards.STORES:
        images = request(tmp_path / store, store)
        images.make(Sampler(), Pipe, 1, share=(0, 1))
        images.finish()
        found.append(np.concatenate(list(images.read(range(3, 19), 7))))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    names = sorted(path.name for path in (tmp_path / "tar").iterdir())
    assert names == ["grid.png", "images-00000.tar", "images-00001.tar", "images-00002.tar", "manifest.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "tar/manifest.jsonl").read_text().split("\n") if line]
    assert rows[9]["path"] == "images-00001.tar/p9.png" and rows[9]["prompt"] == ITEMS[9][1]
    with tarfile.open(tmp_path / "tar/images-00001.tar") as tar:
        assert tar.getnames()[:3] == ["p8.png", "p8.txt", "p8.json"]


def test_a_remote_folder_gets_no_file_for_each_image():
    assert Images.of(ITEMS, epath.Path("gs://bucket/x"), seed=0, about={}).store == "tar"
    with pytest.raises(UserError, match="--store=zip: it must be one of png, tar, array_record"):
        Images.of(ITEMS, epath.Path("x"), seed=0, about={}, store="zip")


@pytest.mark.parametrize("store", shards.STORES)
def test_a_folder_of_another_request_is_refused(tmp_path, store):
    request(tmp_path, store).make(Sampler(), Pipe, 1, share=(0, 1))
    with pytest.raises(UserError, match="holds images of another request .seed differ at id 'p0'"):
        request(tmp_path, store, seed=2).make(Sampler(), Pipe, 2, share=(0, 1))


@pytest.mark.parametrize("store", ["tar", "array_record"])
def test_a_damaged_shard_is_one_line(tmp_path, store):
    path = epath.Path(tmp_path / f"images-00000.{store}")
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    write_shard(path, [{"id": "a", "prompt": "x"}], [image])
    ((row, found),) = read_shard(path)
    assert row == {"id": "a", "prompt": "x"} and (found == image).all()
    path.write_bytes(path.read_bytes()[:700] if store == "tar" else b"x" * 100)
    with pytest.raises(UserError, match=r"images-00000\.\w+ is damaged"):
        list(read_shard(path))


def test_a_lost_or_cut_file_is_one_line(tmp_path):
    images = request(tmp_path, "png")
    images.make(Sampler(), Pipe, 1, share=(0, 1))
    (tmp_path / "p3.png").write_bytes((tmp_path / "p3.png").read_bytes()[:20])
    (tmp_path / "p7.png").unlink()
    for numbers, name in ((range(4), "p3.png"), (range(6, 9), "p7.png")):
        with pytest.raises(UserError, match=f"{name}: .*; delete it, and sample again"):
            list(images.read(numbers, 4))
