"""A study's members on preemptible slices: each is done once, whatever happens to slices, answers and clocks."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_dit.tpu import leases, queue_worker
from scaling_dit.tpu import queue as queue_lib
from scaling_dit.tpu.queue import Member
from scaling_dit.tpu.queue_verb import Queue

from scaling_dit.errors import UserError
from scaling_dit.monitor import heartbeat
from tests.support.paths import ROOT
from tests.support.queue_world import FakeRunner, FakeStore, Work, World


def member(name, depends_on=(), retries=2):
    return Member(name, ("run", name), tuple(depends_on), retries)


def study(rng, count=20):
    """Members of different lengths, some of which depend on earlier ones, and some of which fail."""
    names = [f"m{i:02d}" for i in range(count)]
    members = [
        member(n, rng.sample(names[:i], min(i, rng.choice((0, 0, 1, 2))))) for i, n in enumerate(names)
    ]
    codes = {}
    for name in rng.sample(names, 5):
        codes[name] = rng.choice(([1], [1, 137], [75, 75], [1, 75, 1]))
    return members, {name: rng.uniform(10, 600) for name in names}, codes


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_member_is_done_once(seed):
    members, seconds, codes = study(random.Random(seed))
    world = World(seed, members, seconds, codes)
    world.run()
    for one in world.members():
        assert one.state == queue_lib.DONE and one.code == 0 and one.lease is None
        states = world.states(one.name)
        # What is done stays as it is, and so it is never run again.
        assert states.count(queue_lib.DONE) == 1 and states[-1] == queue_lib.DONE
        assert states.count(queue_lib.RUNNING) >= one.attempts
        failed = [code for name, code in world.work.exits if name == one.name and code not in (0, 75)]
        assert one.failures <= len(failed) <= 2
        assert one.attempts == 1 + one.failures + one.preemptions
    finished = {}
    for one in world.members():
        finished[one.name] = one.changed
    for one in members:
        # Clocks differ by up to 20 s.
        assert all(finished[name] < finished[one.name] + 20 for name in one.depends_on)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    slices=st.integers(1, 6),
    preempted=st.floats(0, 0.02),
    still=st.floats(0, 0.05),
)
def test_every_member_is_done_once_in_rougher_worlds(seed, slices, preempted, still):
    members, seconds, codes = study(random.Random(seed))
    world = World(seed, members, seconds, codes, slices, preempted, still, lost=0.1, refused=0.1)
    world.run(60_000)
    for one in world.members():
        assert world.states(one.name).count(queue_lib.DONE) == (one.state == queue_lib.DONE)
        # Answers that are lost may count an attempt that never began.
        assert one.attempts >= 1 + one.failures


def test_a_member_that_fails_too_often_blocks_those_that_need_it():
    members = [member("a", retries=1), member("b", ["a"]), member("c", ["b"]), member("d")]
    world = World(
        0, members, dict.fromkeys("abcd", 30), {"a": [1, 1, 0]}, preempted=0, still=0, lost=0, refused=0
    )
    world.run()
    by_name = {one.name: one for one in world.members()}
    assert [by_name[name].state for name in "abcd"] == ["failed", "waiting", "waiting", "done"]
    assert (by_name["a"].failures, by_name["a"].code, by_name["a"].attempts) == (2, 1, 2)
    assert queue_lib.blocked(world.members()) == {"b": "a", "c": "a"}
    text = queue_lib.table(world.members(), world.now)
    assert "waits for a, which failed" in text and text.endswith("1 done, 0 running, 2 waiting, 1 failed")


@pytest.mark.parametrize("code", queue_lib.HOPELESS)
def test_codes_after_which_repeating_is_of_no_use(code):
    running = queue_lib.claimed(member("a"), "s", 0.0)
    assert queue_lib.ended(running, code, 1.0).state == queue_lib.FAILED


def test_preemptions_use_up_no_retries_but_are_not_endless():
    one = member("a", retries=0)
    for _ in range(queue_lib.MOST_PREEMPTIONS):
        one = queue_lib.ended(queue_lib.claimed(one, "s", 0.0), 75, 1.0)
        assert one.state == queue_lib.WAITING and one.failures == 0
    # Stopped by its slice, the code says nothing.
    vanished = queue_lib.claimed(one, "s", 0.0)
    assert (
        queue_lib.ended(dataclasses.replace(vanished, preemptions=0), -15, 1.0, stopped=True).preemptions == 1
    )
    assert queue_lib.claimed(vanished, "t", 9e9).state == queue_lib.FAILED


def test_a_lease_is_free_only_after_its_end_and_the_grace():
    held = queue_lib.claimed(member("a"), "s", 1000.0)
    store = [queue_lib.Held(held, 1)]
    end = 1000 + leases.SECONDS + leases.GRACE
    assert not queue_lib.runnable(store, end - 1) and queue_lib.runnable(store, end + 1)
    assert leases.valid(held.lease, 1000 + leases.SECONDS - leases.STOPPING - 1)
    assert not leases.valid(held.lease, 1000 + leases.SECONDS - leases.STOPPING + 1)
    # Its work may take PATIENCE to stop.
    assert leases.STOPPING > queue_worker.PATIENCE + queue_worker.POLL


def test_a_slice_that_cannot_renew_stops_in_time():
    store, work = FakeStore(), Work({"a": 1e6})
    queue_lib.add(store, [member("a")])
    runner = FakeRunner(work)
    worker = queue_worker.Worker(store, "s", runner)
    worker.tick(0.0)
    assert runner.name == "a"
    store._refused = 1.0
    for now in range(10, 1000, 10):
        worker.tick(float(now))
        if runner.name is None:
            break
    assert leases.SECONDS - leases.STOPPING <= now <= leases.SECONDS - leases.STOPPING + 10
    assert worker.held is None


def test_leases_are_renewed_so_that_a_calm_world_needs_one_attempt_each():
    members, seconds, _ = study(random.Random(1), 6)
    long = {name: 2000 + value for name, value in seconds.items()}
    world = World(1, members, long, preempted=0, still=0, lost=0, refused=0)
    world.run()
    assert [one.attempts for one in world.members()] == [1] * 6


def test_a_lease_of_another_slice_is_not_ones_own():
    store, work = FakeStore(), Work({"a": 1e6})
    queue_lib.add(store, [member("a")])
    runner = FakeRunner(work)
    worker = queue_worker.Worker(store, "s", runner)
    worker.tick(0.0)
    (held,) = queue_lib.read_all(store)
    # By a clock that is far ahead.
    assert queue_lib.change(store, held, queue_lib.claimed(held.member, "t", 1000.0))
    worker.tick(100.0)
    assert runner.name is None and worker.held is None
    assert queue_lib.read_all(store)[0].member.lease.owner == "t"


def test_a_result_waits_until_the_store_answers():
    store, work = FakeStore(), Work({"a": 5})
    queue_lib.add(store, [member("a")])
    runner = FakeRunner(work)
    worker = queue_worker.Worker(store, "s", runner)
    worker.tick(0.0)
    runner.advance(10)
    store._refused = 1.0
    # Longer than the lease: nobody else asked for it.
    assert worker.tick(10.0) and worker.tick(1000.0)
    store._refused = 0.0
    worker.tick(1010.0)
    assert queue_lib.read_all(store)[0].member.state == queue_lib.DONE
    assert not worker.tick(1011.0)


@pytest.mark.parametrize(
    "members, expected",
    [
        ([member("a"), member("a")], "two members"),
        ([member("a b")], "a name has letters"),
        ([Member("a", ())], "has no command"),
        ([member("a", ["bb"]), member("b")], "depends on 'bb', which is not in the queue; did you mean 'b'"),
        ([member("a", ["b"]), member("b", ["a"])], "a, b depend on each other in a circle"),
        ([member("a", ["a"])], "in a circle"),
        ([member("a", retries=-1)], "at least 0"),
    ],
)
def test_members_that_cannot_be_added(members, expected):
    store = FakeStore()
    with pytest.raises(UserError, match=expected):
        queue_lib.add(store, members)
    assert not store.objects


def test_adding_again_changes_nothing_and_another_command_is_refused():
    store = FakeStore()
    queue_lib.add(store, [member("a"), member("b", ["a"])])
    before = dict(store.objects)
    queue_lib.add(store, [member("a"), member("b", ["a"])])
    assert store.objects == before
    queue_lib.add(store, [member("c", ["b"])])
    assert [held.member.order for held in queue_lib.read_all(store)] == [0, 1, 2]
    with pytest.raises(UserError, match="with another command"):
        queue_lib.add(store, [Member("a", ("other",))])


@pytest.mark.parametrize(
    "value, expected",
    [
        ({"name": "a"}, "members.json, member 1: command missing"),
        ({"name": "a", "command": "ls"}, "command must be of type list"),
        ({"name": "a", "command": ["ls", 1]}, "a list of words"),
        ({"name": "a", "command": ["ls"], "depend_on": []}, "no key 'depend_on'; did you mean 'depends_on'"),
        ("a", "a member is an object"),
    ],
)
def test_a_file_of_members_is_checked(tmp_path, value, expected):
    path = tmp_path / "members.json"
    path.write_text(json.dumps([value]))
    with pytest.raises(UserError, match=expected):
        queue_worker.read_members(path)


def slice_process(folder, owner, *, host=0, hosts=1):
    code = (
        "import sys; from scaling_dit.tpu import queue_worker as w; w.POLL = w.IDLE = 0.05\n"
        f"sys.exit(w.main('run', {str(folder / 'queue')!r}, owner={owner!r}, logs={str(folder / 'logs')!r}, "
        f"host={host}, hosts={hosts}))"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


SCRIPT = """
import sys, time
open(sys.argv[1], 'a').write('x')
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def shell_member(tmp_path, name, seconds=0.0, code=0, depends_on=()):
    command = (sys.executable, "-c", SCRIPT, str(tmp_path / f"{name}.ran"), str(seconds), str(code))
    return {"name": name, "command": list(command), "depends_on": list(depends_on)}


def test_real_slices_and_real_commands(tmp_path, capsys):
    path = tmp_path / "members.json"
    asked = [
        shell_member(tmp_path, f"m{i}", depends_on=[f"m{i - 1}"] if i % 3 == 2 else ()) for i in range(6)
    ]
    asked += [shell_member(tmp_path, "usage", code=2), shell_member(tmp_path, "; rm -rf $(x)"[2:4] + "odd")]
    path.write_text(json.dumps(asked))
    assert queue_worker.main("add", str(tmp_path / "queue"), members=str(path)) == 0
    slices = [slice_process(tmp_path, f"slice-{i}") for i in range(2)]
    assert [one.wait(60) for one in slices] == [0, 0]
    for i in range(2):
        (beat,) = heartbeat.read(epath.Path(tmp_path / "queue" / "heartbeats" / f"slice-{i}"))
        assert (beat["state"], beat["process"]) == ("done", 0)
    capsys.readouterr()
    assert queue_worker.main("status", str(tmp_path / "queue"), as_json=True) == 1
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found.pop("usage")["state"] == "failed"
    for name, one in found.items():
        assert (one["state"], one["attempts"]) == ("done", 1)
        assert (tmp_path / f"{name}.ran").read_text() == "x"


def test_sigterm_gives_the_member_back_and_the_hosts_of_a_slice_run_together(tmp_path):
    store = leases.open_store(str(tmp_path / "queue"))
    asked = shell_member(tmp_path, "long", seconds=60)
    queue_lib.add(store, [queue_lib.from_mapping(asked, "test")])
    hosts = [slice_process(tmp_path, "slice", host=host, hosts=2) for host in range(2)]
    ran = tmp_path / "long.ran"
    deadline = time.monotonic() + 60
    while not ran.exists() or ran.read_text() != "xx":
        assert time.monotonic() < deadline and all(host.poll() is None for host in hosts)
        time.sleep(0.05)
    for host in hosts:
        host.send_signal(signal.SIGTERM)
    assert [host.wait(30) for host in hosts] == [75, 75]
    (held,) = queue_lib.read_all(store)
    assert (held.member.state, held.member.preemptions, held.member.failures) == ("waiting", 1, 0)


def test_a_slice_that_is_killed_takes_its_command_with_it(tmp_path):
    store = leases.open_store(str(tmp_path / "queue"))
    queue_lib.add(store, [queue_lib.from_mapping(shell_member(tmp_path, "long", seconds=60), "test")])
    worker, ran = slice_process(tmp_path, "slice"), tmp_path / "long.ran"
    deadline = time.monotonic() + 60
    while not ran.exists() or not ran.read_text():
        assert time.monotonic() < deadline and worker.poll() is None
        time.sleep(0.05)
    (command,) = pathlib.Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    worker.kill()
    worker.wait()
    while pathlib.Path(f"/proc/{command}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # Its lease lasts, and the next slice counts a preemption.
    (held,) = queue_lib.read_all(store)
    assert held.member.state == "running" and queue_lib.claimed(held.member, "t", 0.0).preemptions == 1


def test_a_command_that_cannot_start_fails(tmp_path):
    runner = queue_worker.Processes(tmp_path / "logs")
    runner.start(["/no/such/program"], "a")
    assert runner.poll() == 127 and runner.stop() == 127
    assert "cannot start" in (tmp_path / "logs" / "a.log").read_text()


def test_a_command_that_does_not_stop_is_killed_with_its_children(tmp_path):
    runner = queue_worker.Processes(tmp_path / "logs", patience=0.5)
    child = tmp_path / "child"
    runner.start(["bash", "-c", f"trap '' TERM; sleep 300 & echo $! > {child}; wait; sleep 300"], "a")
    while not child.exists() or not child.read_text():
        time.sleep(0.02)
    assert runner.stop() == -signal.SIGKILL
    time.sleep(0.1)
    stat = pathlib.Path(f"/proc/{child.read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] in "ZX"
    assert os.getpgrp() > 0


def test_the_verb(tmp_path, capsys):
    path, place = tmp_path / "members.json", str(tmp_path / "queue")
    path.write_text(
        json.dumps(
            [
                {"name": "a", "command": ["echo", "a b; $(x)"]},
                {"name": "b", "command": ["ls"], "depends_on": ["a"]},
            ]
        )
    )

    def verb(*arguments):
        code = Queue.parse([*arguments, f"--queue={place}"]).run()
        return code, capsys.readouterr().out

    assert verb("add", f"--members={path}", "--dry_run") == (0, "a: echo 'a b; $(x)'\nb: ls\n")
    assert verb("status") == (0, f"{place} has no members\n")
    assert verb("add", f"--members={path}") == (0, f"2 members are in {place}\n")
    assert verb("run", "--dry_run") == (0, "a: echo 'a b; $(x)'\n")
    assert verb("status")[1].endswith("0 done, 0 running, 2 waiting, 0 failed\n")
    for arguments, expected in (
        (["delete"], "one of add, run, status"),
        (["add"], "needs --members"),
        (["run", "--host=1"], "it must be 0 to 0"),
        (["run", "--host=1", "--hosts=2"], "--slice missing"),
    ):
        with pytest.raises(UserError, match=expected):
            verb(*arguments)
