"""A run's model and its weights: load, encode_text, predict; and what a workdir must hold."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.ema import find_ema
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.encoders import scratch
from scaling_dit.errors import UserError
from scaling_dit.model import frozen
from scaling_dit.model.build import abstract_params, build_model, open_source
from scaling_dit.training.rewind import SpikeDetector
from scaling_dit.training.start import Run

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def pipe(smoke_run):
    return scaling_dit.load(smoke_run)


def test_text_and_prediction_have_their_shapes(pipe):
    tokens, mask, pooled = pipe.encode_text(["a red circle", "a large blue square above a red circle"])
    length = pipe.config.text_encoder.length
    assert tokens.shape == (2, length, 32) and mask.shape == (2, length) and pooled.shape == (2, 32)
    # Words and both ends.
    assert mask.sum(1).tolist() == [5, 10]
    latents = jnp.zeros((2, 16, 16, 3))
    prediction = pipe.predict(latents, jnp.array([10.0, 500.0]), tokens, mask)
    assert prediction.shape == latents.shape and prediction.dtype == jnp.float32
    assert np.isfinite(prediction).all()


def test_padding_is_hidden_from_the_backbone_only_while_text_mask_is_on(pipe):
    tokens, mask, _ = pipe.encode_text(["a red circle"])
    noise = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    garbage = jnp.where(mask[..., None], tokens, 100.0)
    times = jnp.array([500.0])
    masked = [pipe.predict(noise, times, text, mask) for text in (tokens, garbage)]
    np.testing.assert_array_equal(*masked)
    shown = [pipe.predict(noise, times, text) for text in (tokens, garbage)]
    assert np.abs(shown[0] - shown[1]).max() > 1e-6


def test_steps_and_averages_of_a_run_can_be_chosen(smoke_run, pipe):
    assert pipe.step == 4
    early, average = scaling_dit.load(smoke_run, step=2), scaling_dit.load(smoke_run, ema=0.995)
    assert early.step == 2
    # One program samples from them all.
    assert early.sampler() is average.sampler() is pipe.sampler()
    for other in (early, average):
        differs = jax.tree.map(
            lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), pipe.params, other.params
        )
        assert any(jax.tree.leaves(differs))
    same = scaling_dit.load(smoke_run, ema=0)
    jax.tree.map(np.testing.assert_array_equal, pipe.params, same.params)


@pytest.mark.slow
def test_averages_of_parameters_in_bfloat16_are_read_in_float32(tmp_path):
    changes = ["backbone.param_dtype=bfloat16", "optim.ema_power=(0.05,0.1)", "eval.every=0"]
    run = Run.open(
        config_lib.load("shapes:smoke", [f"--config.{change}" for change in changes]), Workdir(tmp_path)
    )
    state = run.program.init(jax.random.key(0))
    state = state.replace(step=state.step + 1)
    with Checkpoints(tmp_path / "checkpoints") as store:
        store.save(1, state, run.extra([], SpikeDetector(run.config.rewind)))
    raw = scaling_dit.load(tmp_path).params["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"]
    assert raw.dtype == jnp.bfloat16
    for ema in (0.995, "power-0.1"):
        average = scaling_dit.load(tmp_path, ema=ema).params["backbone"]["mid_block"]["mlp"]["fc1"]["kernel"]
        assert average.dtype == jnp.float32
        np.testing.assert_array_equal(average.astype(jnp.bfloat16), raw)


def test_mistakes_are_told_in_one_line(smoke_run, tmp_path):
    with pytest.raises(UserError, match="keeps no EMA of decay 0.5; it keeps 0.995"):
        scaling_dit.load(smoke_run, ema=0.5)
    with pytest.raises(UserError, match="no run in"):
        scaling_dit.load(tmp_path)
    with pytest.raises(UserError, match="3"):
        scaling_dit.load(smoke_run, step=3)


def test_the_newest_checkpoint_may_be_replaced_while_a_run_is_opened(smoke_run, tmp_path, monkeypatch):
    """As by training that continues: the newest at the first look is gone when it is read, and there is a newer one."""
    shutil.copytree(smoke_run, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    real, asked = Checkpoints.restore_params, []

    def restore_params(self, step, target, *, ema=None):
        asked.append(step)
        if len(asked) == 1:
            (folder / "4").rename(folder / "6")
        return real(self, step, target, ema=ema)

    monkeypatch.setattr(Checkpoints, "restore_params", restore_params)
    assert scaling_dit.load(tmp_path / "run").step == 6 and asked == [4, 6]
    with pytest.raises(UserError, match=r"no checkpoint of step 4 in .*; there are: \[2, 6\]"):
        # One that was asked for has no other in its place.
        scaling_dit.load(tmp_path / "run", step=4)


def test_widths_come_from_codec_and_text_encoder():
    config = config_lib.load("experiments/shapes.py:smoke", ["--config.text_encoder.dim=16"])
    params = abstract_params(config)
    assert params["backbone"]["context_embed"]["kernel"].shape == (16, 32)
    assert params["backbone"]["patch_embed"]["kernel"].shape == (config.backbone.patch**2 * 3, 32)


class Returning(nn.Module):
    """A backbone that returns `out` channels, after dropout."""

    in_channels: int = 3
    out: int = 3
    EXTRAS = {}  # noqa: RUF012

    @nn.compact
    def __call__(
        self, latents, timesteps, text, text_mask=None, conditions=None, extras=None, *, train=False
    ):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(8, (3, 3))(latents) + text.mean())
        return nn.Conv(self.out, (3, 3))(x)


class Demanding(Returning):
    EXTRAS = {"pooled": (8,)}  # noqa: RUF012


def build(**fields):
    overrides = [f"--config.backbone.{name}={value}" for name, value in fields.items()]
    config = config_lib.load("experiments/shapes.py:smoke", overrides)
    return build_model(config, scratch.build_tokenizer(open_source(config)))


@pytest.mark.parametrize(
    "out, fits", [(1, False), (3, True), (5, False), pytest.param(6, True, marks=pytest.mark.slow)]
)
def test_a_backbone_that_returns_another_shape_is_refused(out, fits):
    if not fits:
        with pytest.raises(UserError, match=r"Returning returned .* it must return"):
            build(name="tests.sampling.test_pipeline:Returning", out=out)
        return
    model = build(name="tests.sampling.test_pipeline:Returning", out=out)
    latents, text = jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 4, 32))
    # Compiled as a whole, for each operation alone takes longer.
    params, _ = jax.jit(model.init)(jax.random.key(0))
    assert jax.eval_shape(model.predict, params, latents, jnp.zeros(2), text).shape == (2, 16, 16, out)
    predict = jax.jit(functools.partial(model.predict, train=True))
    trained = [predict(params, latents + 1, jnp.zeros(2), text, rng=jax.random.key(k)) for k in (0, 1)]
    # Dropout has its key.
    assert (trained[0] != trained[1]).any()


def test_extras_that_nothing_supplies_are_refused():
    with pytest.raises(UserError, match="needs the extras pooled"):
        build(name="tests.sampling.test_pipeline:Demanding")


def test_zero_asks_for_the_raw_weights_as_a_number_or_a_word(pipe):
    assert all(find_ema(pipe.config, ema) is None for ema in (None, 0, 0.0, "0", "none"))
    assert find_ema(pipe.config, "0.995") == find_ema(pipe.config, 0.995) == "0.995"


def test_frozen_hash_sees_values_names_and_types():
    base = {"a": jnp.ones(3)}
    others = [
        {"a": jnp.zeros(3)},
        {"b": jnp.ones(3)},
        {"a": jnp.ones(3, jnp.bfloat16)},
        {"a": jnp.ones((3, 1))},
    ]
    hashes = [frozen.frozen_hash(tree) for tree in [base, *others]]
    assert len(set(hashes)) == 5 and frozen.frozen_hash({}) == ""


def test_a_trained_run_of_a_folder_needs_no_folder_to_draw():
    overrides = ["--config.source.name=folder:/gone", "--config.source.image_size=24"]
    config = config_lib.load("shapes:smoke", overrides)
    assert build_model(config, scratch.WordTokenizer(("red",))).image_size == 24


def test_a_run_of_an_older_version_opens_with_the_defaults_of_newer_fields(tmp_path):
    saved = config_lib.load("shapes:smoke").to_dict()
    del saved["sample"]["sampler"], saved["diffusion"]["min_snr_gamma"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path) == config_lib.load("shapes:smoke")
