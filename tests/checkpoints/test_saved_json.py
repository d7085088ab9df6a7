"""Saved JSON of a run that is damaged, or a stranger's: one line with the file's name and the remedy."""

import json
import sys

import pytest

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir, open_workdir, read_config
from scaling_dit.cli import main as cli
from scaling_dit.config import own_code
from scaling_dit.encoders.scratch import WordTokenizer
from scaling_dit.errors import UserError
from scaling_dit.monitor import goodput
from scaling_dit.monitor.writers import JsonlWriter
from scaling_dit.training import rewind
from tests.support.mistakes import line_of, swept
from tests.support.runs import tiny

# Contents of a file of JSON that hold nothing right.
DAMAGED = {
    "empty": b"",
    "cut": b'{"a": ',
    "binary": bytes(range(128, 256)),
    "list": b"[1, 2]",
    "number": b"3",
    "null": b"null",
    "text": b'"x"',
    "other object": b'{"a": {"b": 1}}',
    "deep list": b"[" * 10**6 + b"]" * 10**6,
    "deep object": b'{"a":' * 500 + b"1" + b"}" * 500,
    "escapes": b'{"\\u001b[31m": "\\u202e"}',
    "long number": b'{"steps": 1' + b"0" * 10_000 + b"}",
}
VERBS = {
    "train": [],
    "sample": ["a red circle"],
    "evaluate": [],
    "report": [],
    "export": ["--out=exported", "--to=safetensors"],
}


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """The files of a run that has not saved yet, without a training step."""
    config = tiny()
    monkeypatch.chdir(tmp_path)
    run = Workdir(tmp_path / "run")
    run.folder.mkdir()
    run.config.write_text(config_lib.to_json(config))
    WordTokenizer(("a", "red", "circle")).save(run.tokenizer)
    return run


@pytest.mark.parametrize("damage, verb", swept(((damage, verb) for damage in DAMAGED for verb in VERBS), 4))
def test_a_config_that_is_damaged(verb, damage, workdir, capsys):
    workdir.config.write_bytes(DAMAGED[damage])
    line = line_of(capsys, verb, f"--workdir={workdir}", *VERBS[verb])
    assert str(workdir.config) in line
    if damage not in ("other object", "escapes", "long number"):
        assert "is damaged" in line and "which writes it again" in line


# Dotted keys of a config.json, and values that `train` cannot have written there.
VALUES = {
    "backbone": [1], "codec": None, "optim": "adamw", "eval": 3, "metrics": [], "diffusion": {"schedule": {"a": 1}},
    "backbone.name": [], "codec.name": {"x": 1}, "source.name": 3, "steps": "many", "batch": None, "steps#": {"x": 1},
    "eval.metrics": "tifa", "eval.metrics#": [3], "optim.ema": 0.9, "optim.ema#": [[0.9]], "sample.sampler": 4,
    "mesh.data": True,
    "optim.groups": [1], "log.profile": ["a"], "sample.guidance_interval": [[1], 2],
}  # fmt: skip


@pytest.mark.parametrize("key", VALUES)
def test_a_config_with_a_value_of_another_kind(key, workdir):
    saved = json.loads(workdir.config.read_text())
    *sections, name = key.rstrip("#").split(".")
    held = saved
    for section in sections:
        held = held[section]
    held[name] = VALUES[key]
    workdir.config.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="config.json: "):
        read_config(workdir)


@pytest.mark.parametrize("damage", DAMAGED)
def test_rewinds_that_are_damaged(damage, workdir, capsys):
    workdir.rewinds.write_bytes(DAMAGED[damage])
    line = line_of(capsys, "report", f"--workdir={workdir}")
    assert str(workdir.rewinds) in line and "put the run's own file back" in line
    workdir.rewinds.write_text('[{"spike": 4, "to": 2, "data_from": 2, "data_to": 5}]')
    assert rewind.read(workdir.rewinds) == [rewind.Rewind(4, 2, 2, 5)]


@pytest.mark.parametrize("folder", ["goodput", "metrics"])
@pytest.mark.parametrize("damage", [name for name in DAMAGED if name != "empty"])
def test_rows_that_are_damaged(folder, damage, workdir, capsys):
    rows = getattr(workdir, folder)
    rows.mkdir()
    # Not the last line, which a kill may cut.
    (rows / "segment-00001.jsonl").write_bytes(DAMAGED[damage] + b"\n{}\n")
    if folder == "metrics" and damage in ("other object", "deep object", "escapes", "long number"):
        (rows / "segment-00001.jsonl").write_bytes(b'{"step": "x", "scalars": {"a": 1}}\n{}\n')
    assert "segment-00001.jsonl: line 1" in line_of(capsys, "report", f"--workdir={workdir}")


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_finished_run_ends_well_whatever_its_goodput_holds(damage, workdir, capsys):
    workdir.goodput.mkdir()
    (workdir.goodput / "segment-00001.jsonl").write_bytes(DAMAGED[damage] + b"\n[]\n")
    goodput.show(workdir.goodput)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("scaling-dit: where the time went is not known: ")


def test_a_config_is_written_again_if_the_metrics_agree(workdir, capsys):
    config = read_config(workdir)

    def changed(values):
        return config_lib.resolve(config, [f"--config.{key}={value}" for key, value in values.items()])

    with pytest.raises(UserError, match="no metrics that say what the run was started with"):
        workdir.config.write_bytes(b"")
        open_workdir(workdir, config)
    writer = JsonlWriter(workdir.metrics)
    writer.hparams(config_lib.flatten(config) | {"attention": "xla"})
    writer.close()
    for damage in (b"", b"[]", None):
        workdir.config.unlink(missing_ok=True)
        if damage is None:
            workdir.checkpoints.mkdir()
        else:
            workdir.config.write_bytes(damage)
        assert open_workdir(workdir, config).words == ("a", "red", "circle")
        assert "it is written again from --config" in capsys.readouterr().err
        # What is free may differ, the rest may not.
        open_workdir(workdir, changed({"log.every": 7}))
        with pytest.raises(UserError, match=r"started with another config: batch is 8 there and 24 here"):
            open_workdir(workdir, changed({"batch": 24}))


# A stranger's workdir

FOREIGN = {
    "codec.name": "tempfile:mkdtemp",
    "backbone.name": "os:getcwd",
    "text_encoder.name": "subprocess:run",
    "source.name": "tempfile:TemporaryDirectory",
    "diffusion.schedule": "stranger:Part",
    "sample.sampler": "stranger:Part",
    "optim.name": "stranger:Part",
    "eval.metrics": ["stranger:Part"],
    "metrics.tifa": {"second_judge": "stranger:Part"},
}


@pytest.mark.parametrize(
    "key, verb", swept(((key, verb) for key in FOREIGN for verb in VERBS if verb != "report"), 3)
)
def test_a_strangers_workdir_runs_no_code(verb, key, workdir, capsys, monkeypatch):
    monkeypatch.setattr(own_code, "_TRUSTED", set())
    saved = json.loads(workdir.config.read_text())
    section, _, name = key.partition(".")
    saved[section][name] = FOREIGN[key]
    workdir.config.write_text(json.dumps(saved))
    (workdir.folder.parent / "stranger.py").write_text("raise RuntimeError('it ran')")
    line = line_of(capsys, verb, f"--workdir={workdir}", *VERBS[verb])
    assert (
        "names code outside of scaling_dit" in line and "--own_code" in line and str(workdir.config) in line
    )
    assert "stranger" not in sys.modules


def test_the_report_of_a_strangers_run_needs_no_code(workdir, capsys, monkeypatch):
    monkeypatch.setattr(own_code, "_TRUSTED", set())
    saved = json.loads(workdir.config.read_text())
    saved["backbone"]["name"] = "stranger:Part"
    workdir.config.write_text(json.dumps(saved))
    assert cli.main(["report", str(workdir)]) == 0
    assert "stranger:Part, batch 8, step 0 of 20" in capsys.readouterr().out


def test_what_its_user_named_a_process_may_run(workdir, monkeypatch):
    monkeypatch.setattr(own_code, "_TRUSTED", set())
    saved = json.loads(workdir.config.read_text())
    saved["optim"]["name"] = "optax:scale_by_lion"
    workdir.config.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="optax:scale_by_lion"):
        read_config(workdir)
    assert read_config(workdir, own_code=True).optim.name == "optax:scale_by_lion"
    own_code._TRUSTED.clear()
    config_lib.resolve(config_lib.defaults(), ["--config.optim.name=optax:scale_by_lion"])
    assert read_config(workdir).optim.fields.b1 == 0.9


def test_samplers_of_the_package_are_no_strangers():
    name = "scaling_dit.diffusion.published_samplers:Euler"
    assert own_code.own_names({"sample": {"sampler": name}, "source": {"name": "folder:a:b"}}) == {}
    assert own_code.own_names({"codec": {"name": "scaling_dit.files:write_whole"}}) != {}
    # This one has no place, so a module of that name would be imported.
    assert own_code.own_names({"source": {"name": "shapes:a"}}) == {"source.name": "shapes:a"}


def test_a_judge_of_ones_own_counts_where_it_is_asked():
    sections = {
        "tifa": {"judge": "openai:http://x", "second_judge": "mine:Judge"},
        "dpg": {"judge": "shapes:a"},
    }
    named = {"metrics.tifa.second_judge": "mine:Judge", "metrics.dpg.judge": "shapes:a"}
    assert own_code.judge_names({"metrics": sections}) == named
    # Nothing that is trained depends on it.
    assert own_code.own_names({"metrics": sections}) == {}


def test_another_start_of_a_run_imports_what_it_names_itself(workdir, monkeypatch):
    """Parts that sample and score may change from start to start; the others may not, and are not imported."""
    config = read_config(workdir)
    monkeypatch.setattr(own_code, "_TRUSTED", set())
    saved = json.loads(workdir.config.read_text())
    saved["sample"]["sampler"] = "stranger:Part"
    saved["eval"]["metrics"] = ["stranger:Score"]
    workdir.config.write_text(json.dumps(saved))
    open_workdir(workdir, config)
    saved["optim"]["name"] = "stranger:Part"
    workdir.config.write_text(json.dumps(saved))
    with pytest.raises(
        UserError, match="another experiment: optim.name is 'stranger:Part' there and 'adamw' here"
    ):
        open_workdir(workdir, config)
