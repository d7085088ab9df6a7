"""Faults of disks and buckets: separated from mistakes, tried again, reported in one line with a code of their own."""

import errno
import os

import pytest
from etils import epath
from etils.epath import backend

from scaling_dit import files, storage
from scaling_dit.cli import main as cli
from scaling_dit.cli.exit_codes import report_errors
from scaling_dit.errors import StorageError, UserError
from tests.support import fake_store


def of(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/a/file")


class HttpError(Exception):
    """As a client of a bucket raises it."""


class FailedPreconditionError(Exception):
    """As etils passes on from TensorFlow, where that is installed."""


class NotFoundError(Exception):
    """As above, of a bucket that does not exist."""


class InvalidArgumentError(Exception):
    """As above, of an operation with wrong shapes."""


HttpError.__module__ = "gcsfs.retry"
for _kind in (FailedPreconditionError, NotFoundError, InvalidArgumentError):
    _kind.__module__ = "tensorflow.python.framework.errors_impl"
UNRESOLVED = (
    "Error executing an HTTP request: libcurl code 6 meaning 'Could not resolve hostname', error details: Could not "
    "resolve host: www.googleapis.com\n\t when reading metadata of gs://nothing-here/x/study.json"
)
TENSORSTORE = ValueError(
    'OUT_OF_RANGE: Error writing "w/0.0" in OCDBT database at local file "/a/d/": Failed writing: "/a/d/1": Failed to '
    "write 222503 bytes to file 14: No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ETIMEDOUT]
)
def test_a_disk_that_refuses_is_no_mistake_of_the_user(number, capsys):
    def run():
        raise of(number)

    assert storage.is_fault(of(number))
    assert report_errors(run) == 74
    assert capsys.readouterr().err == f"scaling-dit: error: {os.strerror(number)}: /a/file\n"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR])
def test_a_wrong_path_is_one_until_a_run_writes_there(number):
    assert not storage.is_fault(of(number))
    assert storage.is_refusal(of(number))

    def run():
        raise of(number)

    assert report_errors(run) == 2


@pytest.mark.parametrize(
    "error",
    [
        TENSORSTORE,
        HttpError("Forbidden, 403"),
        FailedPreconditionError(UNRESOLVED),
        OSError(UNRESOLVED),
        TimeoutError(),
        of(errno.ENOSPC),
        StorageError("x"),
    ],
)
def test_what_a_run_meets_while_it_writes(error):
    assert storage.is_refusal(error)


@pytest.mark.parametrize(
    "error",
    [
        UserError("x"),
        ValueError("a shape"),
        KeyError("w"),
        ZeroDivisionError(),
        InvalidArgumentError("Incompatible shapes: [2] vs. [3]"),
    ],
)
def test_a_fault_of_the_program_stays_one(error):
    assert not storage.is_refusal(error) and not storage.is_fault(error)

    def run():
        raise error

    with pytest.raises(type(error)):
        storage.patiently(run, "it", 60, sleep=lambda seconds: pytest.fail("tried again"))


def test_a_client_of_a_bucket_ends_in_one_line(capsys):
    def run():
        raise HttpError("Forbidden: https://storage\n of a bucket, 403")

    assert report_errors(run) == 74
    assert capsys.readouterr().err == "scaling-dit: error: Forbidden: https://storage of a bucket, 403\n"


# A command of each verb whose first access to a folder is to a remote one.
REMOTE = {
    "train": ["--workdir=s3://bucket/x"],
    "train --config": ["--config=shapes:smoke", "--workdir=s3://bucket/x"],
    "train --from": ["--config=shapes:smoke", "--workdir=w", "--from=s3://bucket/x"],
    "study": ["--workdir=s3://bucket/x"],
    "study --config": ["--config=shapes_core:smoke", "--workdir=s3://bucket/x"],
    "report": ["s3://bucket/x"],
    "evaluate": ["--workdir=s3://bucket/x"],
    "evaluate --images": ["--images=s3://bucket/x", "--metrics=fid", "--reference=w"],
    "evaluate --compare": ["--compare", "s3://bucket/x", "s3://bucket/y"],
    "sample": ["--workdir=s3://bucket/x", "a red circle"],
    "sample --prompts_file": ["--workdir=w", "--prompts_file=s3://bucket/x.txt"],
    "export": ["--workdir=s3://bucket/x", "--out=o", "--to=safetensors"],
    "advise": ["--workdir=s3://bucket/x", "--budget=1e18"],
    "caption": ["--source=folder:s3://bucket/x", "--captioner=shapes", "--out=o"],
    "prepare": ["--config=shapes:smoke", "--config.source.name=folder:s3://bucket/x", "--out=o"],
    "import": ["--from=s3://bucket/x", "--config=shapes:smoke", "--workdir=w"],
}


@pytest.mark.parametrize("words", REMOTE)
@pytest.mark.parametrize("error", [FailedPreconditionError(UNRESOLVED), HttpError("Forbidden, 403")])
def test_a_store_out_of_reach_ends_a_command_in_one_line(words, error, tmp_path, monkeypatch, capsys):
    """Whatever a command asks a store first: whether a folder exists, what is in it, to read, or to make it."""
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise error

    store = fake_store.install(monkeypatch, tmp_path)
    for name in [name for name in dir(backend.Backend) if not name.startswith("_")]:
        monkeypatch.setattr(store, name, refuse)
    assert cli.main([words.split()[0], *REMOTE[words]]) == 74
    line = capsys.readouterr().err
    assert line.startswith("scaling-dit: error: ") and line.count("\n") == 1
    assert storage.reason(error) in line


def test_a_listing_of_what_is_not_there_says_something_about_it():
    assert storage.is_unreachable(FailedPreconditionError(UNRESOLVED))
    assert not storage.is_unreachable(NotFoundError("gs://bucket/x"))


def test_a_reason_ends_with_the_path():
    assert storage.reason(FailedPreconditionError(UNRESOLVED)).endswith("gs://nothing-here/x/study.json")


@pytest.mark.parametrize(
    "error, said", [(of(errno.ENOSPC), "No space left on device"), (TENSORSTORE, "No space left on device"),
                    (HttpError("a\n b"), "a b"), (ValueError(), "ValueError")],
)  # fmt: skip
def test_the_reason_is_short(error, said):
    assert storage.reason(error) == said


class Clock:
    def __init__(self):
        self.now, self.pauses = 0.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def test_it_is_tried_again_until_it_works(capsys):
    clock, left = Clock(), [of(errno.ENOSPC), of(errno.EIO), TENSORSTORE]

    def work():
        if left:
            raise left.pop(0)
        return "done"

    assert storage.patiently(work, "a/row", 60, clock=clock, sleep=clock.sleep) == "done"
    assert clock.pauses == [0.5, 1.0, 2.0]
    assert capsys.readouterr().err == (
        "scaling-dit: cannot write a/row: No space left on device; trying again for 60 s\n"
    )


@pytest.mark.parametrize("seconds", [0, 7, 100])
def test_and_not_longer_than_it_may(seconds, capsys):
    clock = Clock()

    def work():
        raise of(errno.EROFS)

    with pytest.raises(StorageError, match=r"^cannot write a/row.*: Read-only file system$") as error:
        storage.patiently(work, "a/row", seconds, clock=clock, sleep=clock.sleep)
    assert clock.now == seconds and max(clock.pauses, default=0) <= 15
    assert error.value.exit_code == 74
    assert capsys.readouterr().err.count("\n") == (1 if seconds else 0)


def test_a_file_on_a_full_disk_is_a_fault_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise of(errno.ENOSPC)

    path = epath.Path(tmp_path / "whole")
    files.write_whole(path, b"before")
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(
        StorageError, match="cannot write .*whole: No space left on device; files finished before"
    ):
        files.write_whole(path, b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["whole"]
    assert path.read_bytes() == b"before"


def test_a_folder_that_does_not_exist_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot write .*: No such file or directory") as error:
        files.write_whole(epath.Path(tmp_path / "none" / "file"), b"")
    assert error.value.exit_code == 2


def test_a_bucket_that_refuses_a_file(tmp_path, monkeypatch):
    store = fake_store.install(monkeypatch, tmp_path)
    monkeypatch.setattr(store, "open", lambda path, mode: (_ for _ in ()).throw(HttpError("Forbidden, 403")))
    with pytest.raises(StorageError, match="cannot write s3://bucket/file: Forbidden, 403"):
        files.write_whole(epath.Path("s3://bucket/file"), b"")
    with (
        pytest.raises(StorageError, match="cannot write s3://bucket/file: Forbidden, 403; files finished"),
        files.staged(epath.Path("s3://bucket/file")) as local,
    ):
        local.write_bytes(b"some")


@pytest.mark.parametrize("path", ["gs://", "s3:///", "gs:///x"])
def test_a_remote_path_names_a_bucket(path, tmp_path, monkeypatch):
    fake_store.install(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=f"^{path}: it names no bucket; write {path[:2]}://BUCKET/FOLDER$"):
        files.expand(path)
