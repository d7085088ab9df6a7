"""`tpu launch` against a program `gcloud` whose workers are real processes."""

import hashlib
import os
import threading
import time

import jax
import numpy as np
import pytest
from scaling_dit.tpu import outside
from scaling_dit.tpu.state import Limits, Stage
from scaling_dit.tpu.store import Store

from scaling_dit import config as config_lib
from scaling_dit.cli import main as cli
from scaling_dit.sampling import pipeline
from scaling_dit.training import loop
from tests.support import fake_gcloud, xla

QUICK = Limits(poll=0.05, back_off=0.05, back_off_most=0.1, again=5.0, delete=20.0, save=20.0)
# A job of 12 steps whose checkpoints form a chain, so that a step lost or done twice would show at the end. Worker 0
# writes them; all stop when the last is there. Its first two starts get no further than steps 4 and 8, and wait to be
# preempted.
STAND_IN = r"""
set -u
echo "$0 $FAKE_PROCESS of $FAKE_PROCESSES" >> "$1/starts"
number=$(grep -c "$FAKE_PROCESS of" "$1/starts")
# The other has started too, before a checkpoint can bring the next preemption.
while [ "$(grep -c "$((1 - FAKE_PROCESS)) of" "$1/starts")" -lt "$number" ]; do sleep 0.05; done
while :; do
  last=$(ls "$1/checkpoints" | sort -n | tail -n 1)
  if [ "${last:-0}" -ge 12 ]; then exit 0; fi
  if [ "${last:-0}" -ge $((4 * number)) ]; then sleep 0.1; continue; fi
  next=$((${last:-0} + 1))
  if [ "$FAKE_PROCESS" = 0 ]; then
    { cat "$1/checkpoints/${last:-0}" 2>/dev/null; echo "$next"; } | sha256sum > "$1/new"
    mv "$1/new" "$1/checkpoints/$next"
  fi
  echo "step $next"
  sleep 0.02
done
"""


def chain(steps: int = 12) -> str:
    """The last checkpoint of an uninterrupted run."""
    text = ""
    for step in range(1, steps + 1):
        text = hashlib.sha256(f"{text}{step}\n".encode()).hexdigest() + "  -\n"
    return text


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An installed fake on the PATH, and quick times."""
    tmp_path = tmp_path / "with space; $(false) 'quote'"
    tmp_path.mkdir()
    (tmp_path / "shared" / "checkpoints").mkdir(parents=True)
    (tmp_path / "setup.sh").write_text("echo set up\n")
    installed = fake_gcloud.install(
        tmp_path.parent / "cloud", {"PATH": f"{tmp_path.parent / 'cloud/bin'}:{os.environ['PATH']}"}
    )
    monkeypatch.setenv("PATH", f"{installed.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state, with comma"))
    monkeypatch.setattr(outside, "LIMITS", QUICK)
    monkeypatch.setattr(outside, "SLEEP", lambda seconds: time.sleep(min(seconds, 0.15)))
    installed.here = tmp_path
    return installed


def arguments(fake, *flags, backend="queued", topology="v5p:2x2x2"):
    return [
        "tpu", "launch", "--name=first", f"--topology={topology}", "--zones=us-east5-a,us-east5-b", "--hours=1",
        "--price=2", f"--backend={backend}", f"--setup={fake.here / 'setup.sh'}", "--poll=0.05", *flags,
        "--", "sh", "-c", STAND_IN, "odd  name; $(touch hacked) `x` \"'", str(fake.here / "shared"),
    ]  # fmt: skip


def starts(fake) -> list[str]:
    return (fake.here / "shared" / "starts").read_text().splitlines()


@pytest.mark.parametrize(
    "backend, slices",
    [
        ("queued", 1),
        pytest.param("compute", 1, marks=pytest.mark.slow),
        pytest.param("queued", 2, marks=pytest.mark.slow),
    ],
)
def test_a_job_is_preempted_twice_and_ends_as_if_it_was_not(fake, capfd, backend, slices):
    for step in (4, 8):
        fake.plan(fake.here / "shared" / "checkpoints" / str(step), "preempt")
    topology = "v5p:2x2x2" if slices == 1 else "v5p:2x2x1"
    assert cli.main(arguments(fake, f"--slices={slices}", backend=backend, topology=topology)) == 0
    said = capfd.readouterr().err
    assert "the job finished" in said and "preempted" in said
    assert "($2.00 a chip-hour, given by --price)" in said or "at $2.00 a chip-hour, given by --price" in said
    assert (fake.here / "shared" / "checkpoints" / "12").read_text() == chain()
    # Three attempts, each on both workers; the odd argument arrived as it was typed.
    assert sorted(starts(fake)) == sorted(
        f"odd  name; $(touch hacked) `x` \"' {process} of 2" for process in (0, 1) for _ in range(3)
    )
    assert not list(fake.here.parent.rglob("hacked"))
    cloud = fake.cloud()
    assert not cloud.made and cloud.created == 3 and not cloud.templates
    state = Store("first").read_state()
    assert (state.stage, state.attempt, state.restarts) == (Stage.DONE, 3, 2)
    assert cloud.billed("first") <= state.used + 1
    if slices == 2:
        ssh = [call for call in fake.calls() if "ssh" in call]
        assert ssh and all("--node=all" in call and "--worker=all" in call for call in ssh)


# The same, with real training on two devices: those of one host, or of two in processes of `jax.distributed`.
DEVICES = 2
FIELDS = (
    "--config.mesh.fsdp=2", "--config.log.tensorboard=false", "--config.eval.every=0", "--config.steps=45",
    "--config.checkpoint.every=15", "--config.log.every=15", "--config.processes.heartbeat=20",
    "--config.backbone.depth=1",
)  # fmt: skip
TRAIN = ("scaling-dit", "train", "--config=shapes:smoke", *FIELDS)

# Seconds: each look costs as much as many steps of training.
POLL = 4.0


def training_cloud(folder):
    """A fake whose two workers have what training needs in their environment."""
    # The second reads what the first compiled.
    given = xla.one_of_several(devices=DEVICES // 2)
    kept = {
        name: value
        for name, value in given.items()
        if name.startswith(("JAX_", "XLA_", "NPROC", "PYTHONPATH"))
    }
    return fake_gcloud.install(folder, {**kept, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"})


def train(fake, workdir):
    """Launches the training; preempts it when it has saved a checkpoint. Returns the exit code."""

    def saved():
        found = (path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
        return any(name.isdigit() and int(name) > 0 for name in found)

    def preempt():
        while not saved():
            time.sleep(0.01)
        with fake.locked():
            cloud = fake.cloud()
            cloud.preempt(next(one for one in cloud.made.values() if one.state == "ACTIVE"))
            fake.write(cloud)

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    code = cli.main([
        "tpu", "launch", "--name=queued-2", "--topology=v5p:2x2x1", "--slices=2",
        "--backend=queued", "--zones=us-east5-a", "--hours=5", f"--setup={fake.folder / 'setup.sh'}",
        f"--poll={POLL}", "--",
        *TRAIN, f"--workdir={workdir}",
    ])  # fmt: skip
    thread.join(1)
    assert not thread.is_alive()
    return code


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_preempted_training_ends_bit_identical(tmp_path, monkeypatch):
    """Two slices of one host; a stand-in for training is preempted twice on each back-end above."""
    config = config_lib.load("shapes:smoke", list(FIELDS))
    uninterrupted = loop.train(config, tmp_path / "uninterrupted", jax.devices()[:DEVICES]).params
    fake = training_cloud(tmp_path / "cloud")
    (fake.folder / "setup.sh").write_text("true\n")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(outside, "LIMITS", QUICK)
    monkeypatch.setattr(outside, "SLEEP", lambda seconds: time.sleep(min(seconds, POLL)))
    assert train(fake, tmp_path / "run") == 0
    cloud = fake.cloud()
    assert cloud.created == 2 and not cloud.made
    assert Store("queued-2").read_state().restarts >= 1
    params = pipeline.load(tmp_path / "run").params
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(uninterrupted), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
