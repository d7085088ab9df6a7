"""`doctor` on this machine and in two processes, healthy and with one fault."""

import functools
import json
import os
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from scaling_dit.cli import main as cli
from scaling_dit.doctor import probe
from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.training.start import Run
from tests.support import xla
from tests.support.paths import ROOT, SUPPORT
from tests.support.runs import tiny


def test_sums_of_the_devices_here():
    assert probe.sum_error(probe.Machine()) == ""
    wrong = probe.Machine(all_reduce=lambda mesh, rows: probe.all_reduce(mesh, rows).at[3].add(1))
    text = probe.sum_error(wrong)
    assert text.startswith("the sum over all devices is ") and text.endswith("(1 of 1024 numbers differ)")


def test_a_device_that_computes_wrong_is_named(monkeypatch):
    original = probe.jnp.matmul

    def matmul(a, b, **options):
        found = original(a, b, **options)
        return found.at[0, 0].add(1) if a.device == jax.local_devices()[5] else found

    monkeypatch.setattr(probe.jnp, "matmul", matmul)
    assert probe.product_error() == "devices 5 compute a wrong product of two matrices"


def test_storage_of_one_host(tmp_path):
    found = probe.storage(str(tmp_path / "runs"), probe.Machine())
    assert found["error"] == "" and abs(found["clock"]) < 1 and os.listdir(tmp_path / "runs") == []
    # The store's clock is this machine's, so a skew shows.
    skewed = probe.storage(str(tmp_path / "runs"), probe.Machine(now=lambda: probe.time.time() - 50))
    assert -52 < skewed["clock"] < -48
    (tmp_path / "file").touch()
    assert "cannot write to" in probe.storage(str(tmp_path / "file" / "below"), probe.Machine())["error"]
    assert "Permission denied" in probe.storage("/proc/1/x", probe.Machine())["error"] or os.getuid() == 0


def test_hosts_that_do_not_see_the_same_folder(tmp_path, monkeypatch):
    # What the other host wrote lies on its own disk.
    monkeypatch.setattr(
        probe.processes, "gather_bytes", lambda data: [data, b"0" * 32] if data else [data, b""]
    )
    found = probe.storage(str(tmp_path), probe.Machine())
    assert found["error"].startswith(f"cannot read the file of process 1 in {tmp_path}: No such file")
    assert found["error"].endswith("do all hosts see the same folder?") and os.listdir(tmp_path) == []
    # It lies here, with other contents.
    (tmp_path / f".doctor-{'0' * 32}").write_text("another")
    assert "reads other contents from" in probe.storage(str(tmp_path), probe.Machine())["error"]


def test_batches_of_a_run_have_its_conditions():
    """What training and the doctor's steps both read."""
    config = tiny(conditioning__names=("inpaint",))
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    run = types.SimpleNamespace(config=config, source=source, model=model, positions=np.arange(8), buckets=())
    loader = Run.loader(run)
    batch = next(loader)
    loader.close()
    assert batch["conditions"]["inpaint"].shape == (8, 16, 16, 4)


@pytest.fixture
def steps_on_one_device(monkeypatch):
    """Their layouts are not the subject."""
    monkeypatch.setattr(probe.Run, "open", functools.partial(Run.open, devices=jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.usefixtures("steps_on_one_device")
def test_steps_of_a_run_with_conditions():
    steps = probe.train_steps(tiny(conditioning__names=("inpaint",)))
    assert "error" not in steps and len(steps["losses"]) == probe.STEPS


def test_versions_are_those_installed():
    found = probe.installed()
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__


def together(command):
    """The exit codes of a command by two processes of one device each, and what the first printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, *command, f"--coordinator=localhost:{port}", "--processes=2", f"--process={rank}"],
            env=xla.one_of_several(devices=1), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    output = [one.communicate(timeout=400) for one in started]
    # Gloo, which joins CPUs, prints lines of its own before.
    _, brace, document = output[0][0].partition("\n{")
    document = json.loads(brace + document) if brace else output
    return [one.returncode for one in started], document


def faults(document):
    return {check["name"]: check["words"] for check in document["checks"] if check["passed"] is False}


@pytest.mark.slow
def test_a_healthy_run_of_two_processes(tmp_path):
    fields = ["--json", f"--workdir={tmp_path / 'w'}", "--config.backbone.depth=1"]
    codes, document = together(["-m", "scaling_dit", "doctor", *fields])
    assert codes == [0, 0] and document["healthy"], document
    assert [host["process"] for host in document["hosts"]] == [0, 1]
    assert document["hosts"][0]["steps"]["losses"] == document["hosts"][1]["steps"]["losses"]
    assert os.listdir(tmp_path / "w") == []


@pytest.mark.slow
def test_faults_of_one_of_two_processes(tmp_path):
    codes, document = together([str(SUPPORT / "doctor_worker.py"), f"--workdir={tmp_path / 'w'}"])
    assert codes == [1, 1], document
    found = faults(document)
    assert found.keys() == {"packages", "clocks", "workdir", "all-reduce"}
    assert "flax differs: 0.0.1 on" in found["packages"] and "s ahead of" in found["clocks"]
    assert "cannot write to /proc/no/such/folder" in found["workdir"]
    assert "where one device gives" in found["all-reduce"]


@pytest.mark.slow
@pytest.mark.usefixtures("steps_on_one_device")
def test_the_verb_on_this_machine(tmp_path, capsys):
    assert cli.main(["doctor", f"--workdir={tmp_path}", "--config.backbone.depth=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "healthy" and len(lines) == 10
    assert any("3 steps, losses" in line for line in lines)
