"""Every public function checks its arguments: what is none of what it takes is one line."""

import numpy as np
import pytest

import scaling_dit
from scaling_dit.errors import UserError
from scaling_dit.evaluation import METRICS
from scaling_dit.sampling.options import SamplingOptions
from scaling_dit.scaling import laws

NO_PATH = [None, 3, -1.5, True, b"x", [], {}, ..., "", "a\0b", "$NOWHERE_AT_ALL/x", "http://x/y"]
NO_NAME = [None, 3, -1.5, True, b"x", [], {}, ..., "", "x", "\x1b[31m", "os:getcwd", "a b:c"]
POINTS = [1e18, 1e19, 1e20, 1e21]


def fails(call, *args, **kwargs):
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    said = str(error.value)
    assert said and "\n" not in said and "\x1b" not in said
    return said


@pytest.fixture(scope="module")
def backbone():
    return scaling_dit.create("uvit", hidden=32, depth=2, heads=2, patch=8)


@pytest.mark.parametrize("value", NO_PATH, ids=repr)
def test_folders(value):
    assert "no run in" not in fails(scaling_dit.load, value)
    fails(scaling_dit.train, {"steps": 1}, value)


@pytest.mark.parametrize("value", [None, 3, "shapes", [], ...], ids=repr)
def test_configs(value, tmp_path):
    assert "a config must be a ConfigDict" in fails(scaling_dit.train, value, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", NO_NAME, ids=repr)
def test_names(value):
    fails(scaling_dit.create, value)
    fails(scaling_dit.count, value)
    fails(scaling_dit.interop.load_state_dict, value, {})
    fails(scaling_dit.interop.to_state_dict, value, {})
    if not (isinstance(value, str) and ":" in value):
        with pytest.raises(KeyError):
            METRICS[value]


@pytest.mark.parametrize("field", ["patch", "hidden", "depth", "heads", "in_channels", "text_dim"])
@pytest.mark.parametrize("value", ["x", -1, 0, 1.5, True, 10**9, np.zeros(2), print], ids=repr)
def test_sizes_of_a_backbone(field, value):
    fails(
        lambda: scaling_dit.count(
            scaling_dit.create("uvit", **({"hidden": 32, "depth": 2, "heads": 2} | {field: value}))
        )
    )


@pytest.mark.parametrize(
    "value", [3, "x", (), (1, 2), (0, 8, 3), (8.0, 8, 3), (-8, 8, 3), None, "abc", {}], ids=repr
)
def test_shapes_of_a_count(value, backbone):
    assert "count takes latents=(H, W, C)" in fails(scaling_dit.count, backbone, latents=value)
    fails(scaling_dit.count, backbone, text=value)


@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": 1}, np.zeros(3)], ids=repr)
def test_weights(value, backbone):
    fails(scaling_dit.interop.load_state_dict, backbone, value)
    fails(scaling_dit.interop.to_state_dict, backbone, value)


@pytest.mark.parametrize(
    "value", [None, "x", b"x", [None] * 4, ["a"] * 4, [0.0] * 4, [np.nan] * 4, [1.0], {}], ids=repr
)
def test_points_of_a_law(value):
    fails(laws.power_law, POINTS, value)
    fails(laws.saturating, POINTS, value)
    fails(laws.isoflop, POINTS, POINTS, value)
    fails(laws.fit_parametric, POINTS, POINTS, value)
    fails(laws.envelope, POINTS, POINTS, value)


@pytest.mark.parametrize(
    "option", ["sampler", "steps", "guidance", "guidance_interval", "guidance_method", "batch"]
)
@pytest.mark.parametrize(
    "value", [..., "\x1b", (), [1], np.zeros((2, 2)), np.nan, -1, 10**30, {}, b"x"], ids=repr
)
def test_options_of_sampling(option, value):
    fails(SamplingOptions().replace, **{option: value})


@pytest.fixture(scope="module")
def pipe(smoke_run, on_one_device):
    return scaling_dit.load(smoke_run)


@pytest.mark.parametrize("value", [None, 3, b"a red circle", [3], [None], {"a": 1}, [["a"]], ...], ids=repr)
def test_prompts(value, pipe):
    fails(pipe.sample, value)
    fails(pipe.encode_text, value)


@pytest.mark.parametrize("value", [None, -1, 1.5, "x", True, 2**32, [], np.zeros(2)], ids=repr)
def test_seeds_and_steps(value, pipe, smoke_run):
    fails(pipe.sample, "a", seed=value)
    if value is not None:
        fails(scaling_dit.load, smoke_run, step=value)


@pytest.mark.parametrize("value", [-1, 1.5, "x", True, [], {}, np.zeros(2)], ids=repr)
def test_averages(value, smoke_run):
    fails(scaling_dit.load, smoke_run, ema=value)


def test_one_string_is_one_prompt(pipe):
    one = pipe.sample("a red circle", steps=1)
    assert one.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(one, pipe.sample(["a red circle"], steps=1))


@pytest.mark.parametrize("value", [None, 3, "x", [], np.zeros(3)], ids=repr)
def test_arrays_of_a_prediction(value, pipe):
    latents, times, text = np.zeros((1, 16, 16, 3)), np.zeros(1), np.zeros((1, 16, 32))
    assert "latents is" in fails(pipe.predict, value, times, text)
    assert "timesteps is" in fails(pipe.predict, latents, value, text)
    assert "text is" in fails(pipe.predict, latents, times, value)
