"""Files and objects of jobs and queues that are damaged: each is one line, whatever is wrong with it."""

import json

import pytest
from scaling_dit.tpu import job as job_lib
from scaling_dit.tpu import leases, queue, queue_worker
from scaling_dit.tpu.backends.contract import parsed
from scaling_dit.tpu.commands import Result
from scaling_dit.tpu.state import State
from scaling_dit.tpu.store import Store

from scaling_dit.errors import UserError
from tests.support import tpu_jobs

DEEP = b"[" * 200_000
DAMAGED = [b"", b"{", b"[1, 2]", b'"text"', b"3", b"null", b"\x80\xff", DEEP, b'{"a": ' + DEEP]
AT = pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    made = Store("first")
    made.write_job(tpu_jobs.job())
    made.write_state(State())
    return made


@AT
def test_the_files_of_a_job(kept, data):
    job, state = kept.folder / "job.json", kept.folder / "state.json"
    assert kept.read_job() == tpu_jobs.job() and kept.read_state() == State()
    job.write_bytes(data)
    with pytest.raises(UserError, match="the job's file cannot be read"):
        kept.read_job()
    state.write_bytes(data)
    with pytest.raises(UserError, match=r"state\.json is damaged.*delete it"):
        kept.read_state()
    state.write_text(json.dumps({**State().to_dict(), "stage": "NOWHERE"}))
    with pytest.raises(UserError, match="or of another version"):
        kept.read_state()


@AT
def test_members_of_a_queue_and_what_its_hosts_are_told(tmp_path, data, capsys):
    with pytest.raises(UserError, match="a member of the queue cannot be read"):
        queue.decode(data)
    members = tmp_path / "members.json"
    members.write_bytes(data)
    with pytest.raises(UserError, match=r"members\.json"):
        queue_worker.read_members(members)
    store = leases.LocalStore(tmp_path / "queue")
    assert store.write(f"{queue_worker.SLICES}a", data, leases.ABSENT)
    with pytest.raises(UserError, match="slices/a in the queue's store is damaged"):
        queue_worker.Follower(store, "a", None).tick(0.0)


@AT
def test_answers_of_gcloud_that_are_no_json_decide_nothing(data):
    found = parsed(Result(0, data.decode(errors="replace")))
    assert found is None or not isinstance(found, dict)


def test_a_set_up_script_that_is_no_text(tmp_path, capsys):
    from scaling_dit.cli import main as cli

    script = tmp_path / "setup.sh"
    script.write_bytes(b"echo \xff\xfe\n")
    command = ["tpu", "launch", "--name=first", "--topology=v5e:4x4", "--zones=us-west4-a", "--hours=1"]
    assert cli.main([*command, f"--setup={script}", "--dry-run", "--", "true"]) == 2
    assert "setup.sh: not UTF-8" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be read"):
        job_lib.from_json("{}")
