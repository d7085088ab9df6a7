"""Parts of a user's own that are no such thing: each seam says so in one line that names the part.

The parts are the same for all seams: what returns nothing, what returns a text, what raises, what leaves. What each
seam checks beyond that is tested beside it, and the lines of docs/own_parts.md by test_docs_own_parts.py.
"""

import sys
import types

import flax.linen as nn
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from scaling_dit import backbones, encoders
from scaling_dit import config as config_lib
from scaling_dit.components import Guarded
from scaling_dit.curation.captioning import create_captioner
from scaling_dit.data.sources import contract as sources_contract
from scaling_dit.data.sources import create_source
from scaling_dit.diffusion import guidance, predictions, samplers, schedules, time_sampling, weightings
from scaling_dit.encoders import codec
from scaling_dit.errors import UserError
from scaling_dit.evaluation.metric import METHODS
from scaling_dit.evaluation.registry import choose
from scaling_dit.evaluation.scoring import Scoring, score
from scaling_dit.training import optim
from tests.support.own_sources import Counted

VP = schedules.make_schedule("scaled_linear")


class Nothing:
    """No method at all."""


class AllNone:
    """Every method is there and returns nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def __call__(self, *args, **kwargs):
        return None


class AllText(AllNone):
    """Every method returns a text."""

    def __getattr__(self, name):
        super().__getattr__(name)
        return lambda *args, **kwargs: "text"

    def __call__(self, *args, **kwargs):
        return "text"


class AllRaise(AllNone):
    """Every method raises, with a message of two lines that would colour the terminal."""

    def __getattr__(self, name):
        super().__getattr__(name)
        return self

    def __call__(self, *args, **kwargs):
        raise ZeroDivisionError("first\x1b[31m\nsecond")


def raises():
    raise RuntimeError("first\x1b[31m\nsecond")


def leaves():
    sys.exit("gone")


def gives_none():
    return None


PARTS = {"Nothing": Nothing, "AllNone": AllNone, "AllText": AllText, "AllRaise": AllRaise, "number": 3,
         "raises": raises, "leaves": leaves, "gives_none": gives_none}  # fmt: skip


def open_codec(name):
    codec.check_own_codec(codec.create_codec(name), name, 16)


def open_optimizer(name):
    found = config_lib.resolve(config_lib.defaults(), [f"--config.optim.name={name}"])
    optim.make_optimizer(found.optim, 10)


def open_metric(name):
    chosen = ConfigDict({"metrics": {}})
    (one,) = choose(chosen, (name,))
    scoring = Scoring(one.section, one.metric, one.metric.items(Counted(), 2), 2)
    score(scoring, [np.zeros((2, 4, 4, 3), np.uint8)], 0)


# How each seam opens a part.
SEAMS = {
    "backbone": backbones.create,
    "codec": open_codec,
    "text encoder": lambda name: encoders.create_text_encoder(name, tokenizer=()),
    "source": create_source,
    "captioner": lambda name: create_captioner(name, {}).caption([Image.new("RGB", (8, 8))], [0]),
    "schedule": schedules.make_schedule,
    "prediction": lambda name: predictions.create_prediction(name, {}),
    "weighting": lambda name: weightings.create_weighting(name, {}),
    "time_sampling": lambda name: time_sampling.create_time_sampling(name, {}, VP),
    "sampler": lambda name: samplers.create_sampler(name, {}, VP, 4),
    "guidance": lambda name: guidance.create_guidance(name, {}),
    "optim": open_optimizer,
    "metric": open_metric,
}


@pytest.fixture
def module(monkeypatch):
    """The module `own_wrong`, with the parts of this file."""
    made = types.ModuleType("own_wrong")
    vars(made).update(PARTS)
    monkeypatch.setitem(sys.modules, "own_wrong", made)
    return made


def line(error):
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text
    return text


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("seam", SEAMS)
def test_a_part_that_is_none(seam, part, module):
    with pytest.raises(UserError) as error:
        SEAMS[seam](f"own_wrong:{part}")
    assert f"own_wrong:{part}" in line(error)


# Metrics: classes with all methods, which are called one after the other


def metric_class(**methods):
    right = {
        "items": lambda self, source, count: [types.SimpleNamespace()] * count,
        "init": lambda self: {},
        "update": lambda self, state, batch: (state, [{} for _ in batch.items]),
        "merge": lambda self, one, other: one,
        "result": lambda self, state, rows, seed: {"scalars": {"x": 1.0}},
        "about": lambda self: {},
        "table": lambda self, result: "",
    }
    return type("Wrong", (), right | methods)


def fails(*args, **kwargs):
    raise KeyError("answer")


@pytest.mark.parametrize("method", ["items", "init", "update", "result"])
@pytest.mark.parametrize("what", ["none", "raises", "text"])
def test_a_metric_whose_method_is_wrong(method, what, module):
    from scaling_dit.evaluation.metric import Item

    right = {"items": lambda self, source, count: [Item(str(n), "a prompt") for n in range(count)]}
    wrong = {"none": lambda *args: None, "raises": fails, "text": lambda *args: "text"}[what]
    module.Wrong = metric_class(**(right | {method: wrong}))
    with pytest.raises(UserError) as error:
        open_metric("own_wrong:Wrong")
    said = line(error)
    assert "metric '" in said
    if what == "raises":
        assert f"{method}() raised KeyError: 'answer' (" in said and "test_own_mistakes.py" in said
    assert set(METHODS) == set(vars(metric_class())) & set(METHODS)


def test_the_methods_of_a_guarded_part_are_those_of_the_part():
    guarded = Guarded(types.SimpleNamespace(size=3, half=lambda x: x / 2, fails=lambda: 1 / 0), "part 'x'")
    assert (guarded.size, guarded.half(3)) == (3, 1.5)
    assert isinstance(guarded, types.SimpleNamespace) and not isinstance(guarded, dict)
    with pytest.raises(UserError, match=r"part 'x': fails\(\) raised ZeroDivisionError: division by zero \("):
        guarded.fails()


# Backbones: modules whose call is wrong


def backbone_class(call):
    def run(self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
        return call(self, latents)

    return type("Wrong", (nn.Module,), {"__call__": nn.compact(run), "__module__": "own_wrong"})


CALLS = {
    "returned a NoneType for latents (2, 8, 8, 3); it must return (2, 8, 8, 3)": lambda self, x: None,
    "returned a tuple for latents": lambda self, x: (x, x),
    "returned (2, 8, 8) for latents": lambda self, x: x[..., 0],
    "init() or the call raised TypeError: ": lambda self, x: x + "text",
    "init() or the call raised KeyError: 'width' (": lambda self, x: {}["width"],
    "init() or the call raised SystemExit: 3 (": lambda self, x: sys.exit(3),
    "init() or the call raised ": lambda self, x: float(x.sum()),
}


@pytest.mark.parametrize("message", CALLS)
def test_a_backbone_whose_call_is_wrong(message, module):
    module.Wrong = backbone_class(CALLS[message])
    backbone = backbones.create("own_wrong:Wrong")
    with pytest.raises(UserError) as error:
        backbones.contract.check_own(backbone, (8, 8, 3), (4, 16), "backbone 'own_wrong:Wrong'")
    assert message in line(error)


# Sources: splits and texts


@pytest.mark.parametrize(
    "members, message",
    [
        (
            {"held_out": lambda self: None},
            "held_out() must return the evaluation split, a source; it returned None",
        ),
        ({"held_out": lambda self: [1]}, "has no describe"),
        ({"held_out": lambda self: {}["x"]}, "failed in held_out(): KeyError: 'x'"),
        (
            {"held_out": lambda self: type("Empty", (Counted,), {"__len__": lambda self: 0})()},
            "has no records",
        ),
        ({"held_out": lambda self: sys.exit(1)}, "failed in held_out(): SystemExit: 1"),
    ],
)
def test_a_held_out_split_that_is_none(members, message):
    source = type("Wrong", (Counted,), members)()
    with pytest.raises(UserError) as error:
        sources_contract.held_out(source)
    assert message in line(error) and "Wrong" in line(error)


@pytest.mark.parametrize(
    "texts, message",
    [
        (lambda self: None, "failed in texts(): TypeError: 'NoneType' object is not iterable"),
        (lambda self: ["a", 3], "texts() must give texts, it gave a int"),
        (lambda self: (["a"][number] for number in range(2)), "failed in texts(): IndexError"),
    ],
)
def test_texts_that_are_none(texts, message):
    with pytest.raises(UserError) as error:
        list(sources_contract.texts(type("Wrong", (Counted,), {"texts": texts})()))
    assert message in line(error)


def test_rows_of_a_batch_that_fail():
    source = type("Wrong", (Counted,), {"__getitems__": lambda self, indices: {}[3]})()
    with pytest.raises(UserError, match=r"source Wrong failed on records \[0, 1\]: KeyError: 3"):
        sources_contract.read_many(source, [0, 1])


# Where parts are found, and their own defaults


def test_a_module_that_is_not_found_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        backbones.create("own_missing:Part")
    said = line(error)
    assert f"no module 'own_missing' in {tmp_path} or elsewhere on the Python path" in said
    assert "start from the folder that holds it, or add that to PYTHONPATH" in said


@pytest.mark.parametrize(
    "text, message", [("import sys\nsys.exit(4)", "SystemExit: 4"), ("raise SystemExit", "SystemExit")]
)
def test_a_module_that_leaves(text, message, tmp_path, monkeypatch):
    (tmp_path / "own_leaves.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"importing own_leaves failed at .*own_leaves.py, line .: {message}"):
        backbones.create("own_leaves:Part")


def test_an_own_backbone_has_its_own_defaults(module):
    module.Mine = type("Mine", (nn.Module,), {"depth": 7, "patch": 5, "__annotations__": {"depth": int, "patch": int},
                                              "__module__": "own_wrong", "__call__": same})  # fmt: skip
    before = config_lib.resolve(
        config_lib.defaults(), ["--config.backbone.patch=4", "--config.backbone.depth=3"]
    )
    own = config_lib.resolve(before, ["--config.backbone.name=own_wrong:Mine", "--config.backbone.depth=9"])
    assert own.backbone.to_dict() == {"name": "own_wrong:Mine", "depth": 9, "patch": 5}
    # Families of the library share the meaning of their fields.
    family = config_lib.resolve(before, ["--config.backbone.name=pixart"])
    assert family.backbone.patch == 4


def same(self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False):
    return latents
