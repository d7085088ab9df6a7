"""Golden files: see update_golden.py. If a difference is meant: `make golden`, read the diff, commit it."""

import difflib
import pathlib

import jax
import jax.numpy as jnp
import pytest

from tools import update_golden

EXPERIMENT = """
from scaling_dit import config as config_lib
ARGUMENTS = ("wide",)
def get_config(arg=""):
    config = config_lib.defaults()
    config.steps = 7
    config.backbone.update({"name": "uvit", "hidden": 64 if arg else 32, "depth": 2, "heads": 2})
    return config
"""


# Parameters that take long to trace, or are of a kind with others: large UNets, beside the small one of `backbones`;
# the families of `dit_scaling`, of which `backbones` has each; stages that begin from one another; U-ViT on other data,
# and with one condition in place of another. A slow test compares them as well.
UNTRACED = {
    "backbones-unet_if",
    "digits",
    "dit_scaling-large_dit-h2048-d28-n16",
    "dit_scaling-next_dit-h2304-d24-n32",
    "dit_scaling-pixart-h1536-d28",
    "editing-edges-channel",
    "editing-edit-token",
    "editing-inpaint-channel",
    "editing-outpaint-token",
    "emoji",
    "stages",
    "stages-512",
    "stages-long",
    "stages-shapes-24",
    "stages-shapes-24-48",
    "stages-text",
    "unet_scaling",
    "unet_scaling-if-xl-c512",
    "unet_scaling-sd2",
    "unet_scaling-sdxl-td4_4,pretrained",
}


@pytest.fixture(scope="module")
def texts():
    return update_golden.current(untraced=UNTRACED)


def differences(texts, left_out=()):
    """Lines that differ from the golden files, with what to do about them."""
    stored = {
        str(path.relative_to(update_golden.GOLDEN)): path.read_text()
        for path in update_golden.GOLDEN.rglob("*.txt")
    }
    found = []
    for name in sorted((stored.keys() | texts.keys()) - {*left_out}):
        then, now = stored.get(name, "").splitlines(), texts.get(name, "").splitlines()
        found += difflib.unified_diff(then, now, f"golden/{name}", "now", lineterm="", n=1)
    return "\n".join([*found, "If this is meant: make golden, and commit the files."]) if found else ""


def test_nothing_changed(texts):
    left_out = {f"params/{name}.txt" for name in UNTRACED}
    assert all((update_golden.GOLDEN / name).exists() for name in left_out)
    assert not differences(texts, left_out)


@pytest.mark.slow
def test_nothing_changed_in_the_parameters_of_the_other_experiments():
    """Those that are not traced above, and experiments that have no golden file."""
    traced = {path.stem for path in (update_golden.GOLDEN / "params").glob("*.txt")} - UNTRACED
    left_out = {f"params/{name}.txt" for name in traced}
    assert not differences(update_golden.current(untraced=traced), left_out)


def test_every_experiment_has_its_files(texts):
    files = (update_golden.ROOT / "experiments").glob("[!_]*.py")
    experiments = [path for path in files if "def get_config" in path.read_text()]
    assert experiments
    for path in experiments:
        assert f"configs/{path.stem}.txt" in texts
        assert f"params/{path.stem}.txt" in texts or path.stem in UNTRACED


def test_named_arguments_are_dumped_and_differ(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    # A part of experiments, none itself.
    (tmp_path / "recipe.py").write_text("LEARNING_RATE = 1e-4\n")
    texts = update_golden.current(tmp_path)
    assert set(texts) - {"public.txt"} == {
        f"{kind}/{name}.txt" for kind in ("configs", "params") for name in ("mine", "mine-wide")
    }
    assert "steps = 7\n" in texts["configs/mine.txt"]
    assert "backbone.hidden = 32\n" in texts["configs/mine.txt"]
    assert texts["params/mine.txt"] != texts["params/mine-wide.txt"]
    assert "backbone/" in texts["params/mine.txt"]
    assert "text_encoder/" in texts["params/mine.txt"]


def test_golden_configs_name_no_path_of_this_machine(texts):
    for name, text in texts.items():
        assert str(update_golden.ROOT) not in text, name
        assert str(pathlib.Path.home()) not in text, name


def test_text_of_parameters():
    tree = {
        "b": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
        "a": [jax.ShapeDtypeStruct((1000,), jnp.bfloat16)],
    }
    lines = update_golden.params_text(tree).splitlines()
    assert lines[1:] == ["b/kernel float32 [2, 3]", "total 1,006"]
    assert lines[0].startswith("a/")
    assert lines[0].endswith("bfloat16 [1000]")
