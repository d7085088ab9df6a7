"""Compare-and-swap in folders and in buckets."""

import json
import subprocess
import sys
import urllib.parse

import pytest
from scaling_dit.tpu import leases
from scaling_dit.tpu.leases import ABSENT, BucketStore, LocalStore

from scaling_dit.errors import UserError
from tests.support.paths import ROOT


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code):
        super().__init__(f"message, {code}")
        self.code = code


class FakeBucket:
    """The requests of Cloud Storage's JSON API that a store makes, as gcsfs's `call` takes them; others fail."""

    _location = "https://storage.googleapis.com"

    def __init__(self, page=2):
        self.objects, self.page, self.fault = {}, page, None

    def call(self, method, path, *args, json_out=False, headers=None, data=None, **params):
        if self.fault:
            raise self.fault
        path = path.format(*(urllib.parse.quote(arg, safe="") for arg in args))
        if method == "GET" and path.startswith("b/bucket/o/"):
            assert params == {"alt": "media"} and not json_out
            name = urllib.parse.unquote(path.removeprefix("b/bucket/o/"))
            if name not in self.objects:
                raise FileNotFoundError(path)
            contents, generation = self.objects[name]
            return {"X-Goog-Generation": str(generation)}, contents
        if method == "GET" and path == "b/bucket/o":
            assert json_out and params.pop("fields") == "items(name),nextPageToken"
            start = int(params.pop("pageToken", 0))
            names = sorted(name for name in self.objects if name.startswith(params["prefix"]))[start:]
            more = {"nextPageToken": str(start + self.page)} if len(names) > self.page else {}
            return more | ({"items": [{"name": name} for name in names[: self.page]]} if names else {})
        assert method == "POST" and path == "https://storage.googleapis.com/upload/storage/v1/b/bucket/o"
        assert params["uploadType"] == "media" and set(params) == {"uploadType", "name", "ifGenerationMatch"}
        generation = self.objects.get(params["name"], (b"", 0))[1]
        if generation != params["ifGenerationMatch"]:
            # Which gcsfs makes of status 412.
            raise FileExistsError(path)
        # Generations of a bucket are no counters.
        self.objects[params["name"]] = data, (generation or 1_700_000_000_000_000) + 7
        return {}, b""


@pytest.fixture(params=["folder", "bucket"])
def store(request, tmp_path):
    if request.param == "folder":
        return LocalStore(tmp_path / "store")
    return BucketStore("gs://bucket/a folder/queue", FakeBucket())


def test_a_write_needs_the_generation_that_was_read(store):
    assert store.read("members/a") is None and store.names("") == []
    assert store.write("members/a", b"1", ABSENT)
    assert not store.write("members/a", b"2", ABSENT)
    data, generation = store.read("members/a")
    assert data == b"1" and generation != ABSENT
    assert store.write("members/a", b"2\n\x00", generation)
    assert not store.write("members/a", b"3", generation)
    assert store.read("members/a")[0] == b"2\n\x00"


def test_names_are_those_under_a_prefix(store):
    for name in ("members/b", "members/a", "slices/a", "members/c", "members/d"):
        assert store.write(name, b"", ABSENT)
    assert store.names("members/") == ["members/a", "members/b", "members/c", "members/d"]
    assert store.names("nothing/") == []


def test_a_lost_answer_is_found_out():
    class Loses:
        def __init__(self):
            self.data = None

        def write(self, name, data, generation):
            self.data = self.data or data
            raise OSError("lost")

        def read(self, name):
            return self.data, 1

    store = Loses()
    assert leases.swap(store, "a", b"mine", ABSENT)
    assert not leases.swap(store, "a", b"another's", ABSENT)


def test_errors_of_a_bucket_are_os_errors():
    bucket = FakeBucket()
    store = BucketStore("gs://bucket/queue", bucket)
    bucket.fault = HttpError(503)
    with pytest.raises(OSError, match="gs://bucket: message, 503"):
        store.write("a", b"", ABSENT)
    bucket.fault = HttpError(None)
    with pytest.raises(OSError, match="gs://bucket"):
        store.read("a")


def test_places(tmp_path):
    assert isinstance(leases.open_store(str(tmp_path)), LocalStore)
    with pytest.raises(UserError, match="a folder or on gs://"):
        leases.open_store("s3://bucket/queue")


def test_a_file_that_is_no_object(tmp_path):
    (tmp_path / "members").mkdir()
    (tmp_path / "members" / "a").write_text("{}")
    with pytest.raises(UserError, match="is no object of a queue"):
        LocalStore(tmp_path).read("members/a")


COUNT_UP = """
import json, pathlib, sys
from scaling_dit.tpu.leases import ABSENT, LocalStore
store, won = LocalStore(pathlib.Path(sys.argv[1])), 0
while won < 40:
    found = store.read("counter")
    value, generation = (json.loads(found[0]), found[1]) if found else (0, ABSENT)
    won += store.write("counter", json.dumps(value + 1).encode(), generation)
"""


def test_processes_that_race_lose_no_update(tmp_path):
    racing = [subprocess.Popen([sys.executable, "-c", COUNT_UP, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [one.wait(60) for one in racing] == [0, 0, 0]
    assert json.loads(LocalStore(tmp_path).read("counter")[0]) == 120


def test_leases():
    lease = leases.take("slice", 1000.0)
    assert lease.until == 1000 + leases.SECONDS and lease.token != leases.take("slice", 1000.0).token
    assert leases.Lease.of(json.loads(json.dumps(lease))) == lease and leases.Lease.of(None) is None
    assert leases.free(None, 0) and not leases.free(lease, lease.until + leases.GRACE - 1)
    assert not leases.due(lease, 1001) and leases.due(lease, 1000 + 0.2 * leases.SECONDS)
