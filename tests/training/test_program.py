"""Runs of one process share a program where the step would be the same, and only there."""

import jax
import pytest
from ml_collections import ConfigDict

from scaling_dit.model.build import build_model, make_tokenizer, open_source
from scaling_dit.training import program
from scaling_dit.training.program import BESIDE, StepProgram, run_mesh, shared
from tests.support.runs import tiny


@pytest.fixture(autouse=True)
def of_this_test(monkeypatch):
    """Programs of other tests are neither used nor replaced."""
    monkeypatch.setattr(program, "_last", [])


def shared_of(config: ConfigDict, devices: int = 1) -> StepProgram:
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    return shared(config, model, run_mesh(config, jax.devices()[:devices]))


class Recording(ConfigDict):
    """A config that notes which of its fields were read."""

    def __getattr__(self, name):
        self.__dict__.setdefault("_read", set()).add(name)
        return super().__getattr__(name)

    def __getitem__(self, name):
        self.__dict__.setdefault("_read", set()).add(name)
        return super().__getitem__(name)


def test_the_step_reads_nothing_that_may_differ_between_runs_that_share_it():
    config = tiny()
    source = open_source(config)
    model = build_model(config, make_tokenizer(config, source), source)
    recording = Recording(config)
    recording.__dict__["_read"] = set()
    built = StepProgram.build(recording, model, run_mesh(config, jax.devices()[:1]))
    assert built.decisions["attention"]
    read = recording.__dict__["_read"]
    assert {"optim", "diffusion", "batch", "sharding"} <= read
    assert not read & set(BESIDE)


def test_runs_that_differ_beside_the_step_share_it():
    first = shared_of(tiny())
    changes = {"log__every": 7, "eval__prompts": 2, "checkpoint__every": 3, "loader__threads": 1}
    assert shared_of(tiny(steps=11, seed=5, captions__alt=0.25, sample__steps=3, **changes)) is first


@pytest.mark.parametrize(
    "changes",
    [
        {"optim__learning_rate": 1e-4},
        {"backbone__depth": 4},
        {"diffusion__caption_drop": 0.2},
        {"text_encoder__length": 12},
        {"optim__decay": "cosine"},
        {"source__colours": ("red", "green")},
    ],
    ids=str,
)
def test_a_step_that_differs_is_built(changes):
    first = shared_of(tiny())
    assert shared_of(tiny(**changes)) is not first


def test_other_devices_and_the_steps_of_a_cosine_get_their_own():
    assert shared_of(tiny(), devices=2) is not shared_of(tiny())
    assert shared_of(tiny(optim__decay="cosine")) is not shared_of(tiny(steps=11, optim__decay="cosine"))


@pytest.mark.parametrize(
    "field, value",
    [("diffusion.weighting", "own_part:ones"), ("conditioning.names", ("own_part:Edges",))],
)
def test_a_part_of_the_users_own_is_never_shared(field, value, monkeypatch):
    plain = tiny()
    source = open_source(plain)
    model = build_model(plain, make_tokenizer(plain, source), source)
    with plain.unlocked():
        plain.update_from_flattened_dict({field: value})
    mesh = run_mesh(plain, jax.devices()[:1])
    monkeypatch.setattr(StepProgram, "build", lambda *arguments: object())
    assert shared(plain, model, mesh) is not shared(plain, model, mesh)
    with plain.unlocked():
        plain.update_from_flattened_dict({field: tiny()[field.split(".")[0]][field.split(".")[1]]})
        plain.eval.metrics = ("own_part:Score",)
    assert shared(plain, model, mesh) is shared(plain, model, mesh)
