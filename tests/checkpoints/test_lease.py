"""One writer for a folder: who holds a lease is named, who is gone is replaced, on disks and in buckets."""

import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from typing import ClassVar

import pytest
from etils import epath

from scaling_dit.checkpoints import lease as lease_lib
from scaling_dit.checkpoints.lease import Held, Holder, Lease, leased
from scaling_dit.checkpoints.records import GcsRecord, ObjectRecord, Taken
from scaling_dit.errors import StorageError
from tests.support import fake_store
from tests.support.paths import ROOT

HOLDER = """
    import sys, time
    from etils import epath
    from scaling_dit.checkpoints.lease import Lease
    with Lease(epath.Path(sys.argv[1]), "the run") as lease:
        lease.acquire()
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process, which holds the lease of the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), tmp_path / "lease.json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lease_of(folder, **options):
    return Lease(epath.Path(folder) / "lease.json", "the run", **options)


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path, other):
    with pytest.raises(Held) as refused:
        lease_of(tmp_path).acquire()
    line = str(refused.value)
    assert f"process {other.pid} on host {os.uname().nodename}, for " in line and "\n" not in line
    assert refused.value.exit_code == 2


def test_a_killed_process_is_replaced_at_once(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "lease.json").exists()
    waits = []
    with lease_of(tmp_path, sleep=waits.append) as lease:
        lease.acquire()
        assert lease.held and not waits
        assert json.loads((tmp_path / "lease.json").read_text())["process"] == os.getpid()


def test_a_lease_is_given_up_and_leaves_nothing(tmp_path):
    for _ in range(2):
        with lease_of(tmp_path / "new") as lease:
            assert not (tmp_path / "new" / "lease.json").exists()
            lease.acquire()
            lease.acquire()
            lease.check()
            with pytest.raises(Held):
                lease_of(tmp_path / "new").acquire()
        lease.release()
        assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("left", [b"", b"{", b"[1]", b'{"owner": 1}', b"\0" * 300])
def test_a_file_that_names_nobody_is_replaced(tmp_path, left):
    (tmp_path / "lease.json").write_bytes(left)
    with lease_of(tmp_path) as lease:
        lease.acquire()
        assert Holder.parse((tmp_path / "lease.json").read_bytes())


def elsewhere(beat=0, owner="them"):
    return Holder(owner, "other-host", "another-boot", 17, 0.0, beat)


def test_a_process_of_another_host_that_gives_signs_keeps_it(tmp_path, capsys):
    path = tmp_path / "lease.json"
    path.write_bytes(elsewhere().to_bytes())
    beats = iter(range(1, 9))
    with pytest.raises(Held, match="process 17 on host other-host, for"):
        lease_of(
            tmp_path, sleep=lambda seconds: path.write_bytes(elsewhere(next(beats)).to_bytes())
        ).acquire()
    assert "waiting up to 60 s" in capsys.readouterr().err
    assert Holder.parse(path.read_bytes()).owner == "them"


def test_a_process_of_another_host_without_a_sign_is_replaced(tmp_path, capsys):
    (tmp_path / "lease.json").write_bytes(elsewhere().to_bytes())
    waits = []
    with lease_of(tmp_path, sleep=waits.append) as lease:
        lease.acquire()
    assert sum(waits) == lease_lib.STALE
    assert "taken over" in capsys.readouterr().err


def test_a_folder_that_is_gone_or_replaced_is_noticed(tmp_path):
    folder = tmp_path / "run"
    with lease_of(folder) as lease:
        lease.acquire()
        (folder / "lease.json").rename(tmp_path / "moved.json")
        with pytest.raises(StorageError, match="the run is gone"):
            lease.check()
        (folder / "lease.json").write_text("another")
        with pytest.raises(StorageError, match="the run is gone"):
            lease.check()
    # Not this process's file.
    assert (folder / "lease.json").read_text() == "another"


def test_a_holder_that_was_replaced_stops(tmp_path):
    with lease_of(tmp_path, beat=0.01) as lease:
        lease.acquire()
        (tmp_path / "lease.json").write_bytes(elsewhere().to_bytes())
        lease._thread.join(10)
        with pytest.raises(Held, match="taken over by process 17 on host other-host"):
            lease.check()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot write .*lease.json: (Not a directory|File exists)"):
        lease_of(tmp_path / "file").acquire()


class Bucket(http.server.BaseHTTPRequestHandler):
    """The part of Cloud Storage's JSON API that leases use; `objects` is name -> (contents, generation)."""

    objects: ClassVar[dict] = {}
    refuses = 0

    def do_GET(self):
        found = self.objects.get(self._name())
        self._answer(404 if found is None else 200, *(found or ()))

    def do_POST(self):
        data = self.rfile.read(int(self.headers["content-length"]))
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        (name,), (wanted,) = query["name"], query["ifGenerationMatch"]
        if self.refuses:
            return self._answer(self.refuses)
        if wanted != self.objects.get(name, (b"", "0"))[1]:
            return self._answer(412)
        generation = str(int(wanted) + 1000)
        self.objects[name] = (data, generation)
        self._answer(200, json.dumps({"generation": generation}).encode(), generation)

    def do_DELETE(self):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if query["ifGenerationMatch"] != [self.objects[self._name()][1]]:
            return self._answer(412)
        del self.objects[self._name()]
        self._answer(204)

    def _name(self):
        return urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.rpartition("/o/")[2])

    def _answer(self, code, data=b"", generation="0"):
        self.send_response(code)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-goog-generation", generation)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket():
    """(objects, function that gives a record of `run/lease.json`)."""
    requests = pytest.importorskip("requests")
    handler = type("Fresh", (Bucket,), {"objects": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield handler, lambda: GcsRecord("bucket", "run/lease.json", requests.Session(), endpoint)
        server.shutdown()


def of(record, **options):
    return Lease(epath.Path("gs://bucket/run/lease.json"), "gs://bucket/run", record=record, **options)


def test_a_bucket_takes_a_change_of_the_version_it_has_only(bucket):
    handler, record = bucket
    one, two = record(), record()
    assert one.read() is None
    first = one.write(b"one", None)
    with pytest.raises(Taken):
        two.write(b"two", None)
    second = two.write(b"two", first)
    with pytest.raises(Taken):
        one.write(b"one again", first)
    one.remove(first)
    assert two.read() == (b"two", second)
    two.remove(second)
    assert not handler.objects


def test_two_that_start_at_once_on_a_bucket(bucket):
    _, record = bucket
    # Both have read that there is no lease.
    late = record()
    late.read = lambda read=late.read: None if late.first else read()
    late.first = True
    with of(record()) as lease:
        lease.acquire()
        with pytest.raises(
            Held, match=f"gs://bucket/run is written by .*process {os.getpid()}|another process"
        ):
            of(late).acquire()
        lease.check()


def test_a_stale_lease_of_a_bucket_is_taken_over_and_its_holder_stops(bucket):
    handler, record = bucket
    sleeper = of(record(), beat=0.2)
    sleeper.acquire()
    # As if it were of another host, and hung.
    data, generation = handler.objects["run/lease.json"]
    stranger = Holder(**{**json.loads(data), "host": "other-host"}).to_bytes()
    handler.objects["run/lease.json"] = (stranger, generation)
    with of(record(), sleep=lambda seconds: None) as lease:
        lease.acquire()
        assert Holder.parse(handler.objects["run/lease.json"][0]).owner == lease._me.owner
        sleeper._thread.join(10)
        with pytest.raises(Held, match="taken over"):
            sleeper.check()
        sleeper.release()
        lease.check()
    assert not handler.objects


@pytest.mark.parametrize("code", [401, 403, 503])
def test_a_bucket_that_refuses_is_a_fault_of_storage(bucket, code):
    handler, record = bucket
    handler.refuses = code
    with pytest.raises(StorageError, match=f"the bucket refuses: {code}"):
        of(record()).acquire()


def test_on_a_store_without_preconditions_the_last_writer_has_it(tmp_path, monkeypatch):
    fake_store.install(monkeypatch, tmp_path)
    path = epath.Path("s3://bucket/run/lease.json")
    winner = elsewhere(owner="winner")

    def meanwhile(seconds):
        ObjectRecord(path).write(winner.to_bytes(), path.read_bytes())

    with pytest.raises(Held, match="host other-host"):
        Lease(path, "s3://bucket/run", sleep=meanwhile).acquire()
    path.unlink()
    with leased(path, "s3://bucket/run") as lease:
        lease._sleep = lambda seconds: None
        lease.acquire()
        lease.check()
    assert not path.exists()
