"""Readers of shards: no more open than the limit of open files allows, and a failure to open that names its cause."""

import os
import resource
import threading

import pytest

from scaling_dit.data.prepared import manifest, readers
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError
from tests.support.prepared_records import assert_is, write_set

SHARDS = 60


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return folder, write_set(folder, counts=((1, 1),) * SHARDS)


@pytest.fixture
def few_files():
    """Sets the limit of open files so that this many more can be opened; the old limit comes back."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more):
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        # The lowest free number is given out first, and the limit is on numbers.
        shown = [int(number) for number in os.listdir("/proc/self/fd")]
        # One of them was that of the listing.
        used = {number for number in shown if os.path.exists(f"/proc/self/fd/{number}")}
        free = [number for number in range(len(used) + more + 1) if number not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], before[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def opened(folder):
    return create_source(f"latents:{folder}", image_size=16)


def test_more_shards_than_open_files(many, few_files):
    """In any order, several times, both splits; those that were not used for longest are closed."""
    folder, numbers = many
    train = opened(folder)
    held_out = train.held_out()
    few_files(24)
    for index in [*range(SHARDS), *reversed(range(SHARDS)), *range(0, SHARDS, 7)]:
        assert_is(train[index], numbers["train"][index])
        assert_is(held_out[index], numbers["held_out"][index])
    for index, record in enumerate(train.__getitems__(range(SHARDS))):
        assert_is(record, numbers["train"][index])
    assert 1 <= len(train._readers) <= train._readers.limit < SHARDS


def test_threads_share_few_readers(many, few_files):
    folder, numbers = many
    source = opened(folder)
    few_files(30)
    wrong = []

    def work(start):
        for index in [(start + step) % SHARDS for step in range(SHARDS)]:
            try:
                assert_is(source[index], numbers["train"][index])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(7 * start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_that_is_used_is_kept(many):
    kept = readers.Readers()
    kept.limit = 3
    folder, _ = many
    paths = sorted((folder / manifest.SHARDS).glob("*.train.*"))[:6]
    first = kept.get(paths[0], 1)
    for path in paths[1:]:
        kept.get(path, 1)
        assert kept.get(paths[0], 1) is first
    assert len(kept) == 3


def test_a_failure_to_open_names_file_and_cause(many, few_files, monkeypatch):
    folder, _ = many
    source = opened(folder)
    few_files(0)
    with pytest.raises(
        UserError,
        match=r"cannot open shard .*00000\.train\.array_record: Too many open files; raise the limit",
    ):
        source[0]
    few_files(20)
    path = folder / manifest.SHARDS / "00003.train.array_record"
    path.rename(f"{path}.away")
    with pytest.raises(UserError, match=r"00003\.train\.array_record: No such file or directory"):
        source[3]
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"00003\.train\.array_record is a pipe \(FIFO\), no file"):
        opened(folder)
    path.unlink()
    (folder / manifest.SHARDS / "00003.train.array_record.away").rename(path)


def test_the_limit_follows_that_of_the_process(monkeypatch):
    def allowed(count):
        monkeypatch.setattr(resource, "getrlimit", lambda what: (count, resource.RLIM_INFINITY))
        return readers.limit()

    assert [allowed(count) for count in (0, 64, 1024, 10**6, resource.RLIM_INFINITY)] == [
        4,
        16,
        256,
        4096,
        4096,
    ]
