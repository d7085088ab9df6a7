"""Averages rebuilt from snapshots against averages that were kept, and shares against weights found by recursion."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import scaling_dit
from scaling_dit import config as config_lib
from scaling_dit.checkpoints import posthoc_ema
from scaling_dit.checkpoints.ema import ema_name, find_ema, power_exponent, power_name, update_power_emas
from scaling_dit.checkpoints.posthoc_ema import Snapshots, fit, missing_shares, thinned
from scaling_dit.checkpoints.state import TrainState, create_state
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError
from scaling_dit.training import optim
from tests.support.runs import open_on_one_device

WIDTHS = (0.05, 0.1)
TRACKS = [power_name(width) for width in WIDTHS]
DECAYS = (0.97, 0.99, 0.995, 0.999, 0.9995)


def ema_rates(name, steps):
    """float64 [steps]: how far an average moves at each step, written down independently of the package."""
    t = np.arange(1, steps + 1)
    if name.startswith("power"):
        # Above the root.
        gamma = 1 / float(name[6:])
        # Newton on sigma^2 (g + 2)^2 (g + 3) = g + 1.
        for _ in range(50):
            s2 = float(name[6:]) ** 2
            value = s2 * (gamma + 2) ** 2 * (gamma + 3) - gamma - 1
            gamma -= value / (s2 * ((gamma + 2) ** 2 + 2 * (gamma + 2) * (gamma + 3)) - 1)
        return 1 - (1 - 1 / t) ** (gamma + 1)
    return 1 - np.minimum(float(name), t / (t + 9))


def recursion(values, name):
    """float64: the average of values[0], ..., values[T] by its definition."""
    mean = values[0]
    for value, rate in zip(values[1:], ema_rates(name, len(values) - 1), strict=True):
        mean = mean + rate * (value - mean)
    return mean


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_exponents_are_those_of_the_paper(width, gamma):
    exponent = power_exponent(width)
    # EDM2, section 3.1.
    assert exponent - 1 == pytest.approx(gamma, abs=0.005)
    t = (np.arange(10**5) + 0.5) / 10**5
    weights = t ** (exponent - 1)
    mean = np.average(t, weights=weights)
    assert np.average((t - mean) ** 2, weights=weights) ** 0.5 == pytest.approx(width, rel=1e-3)
    for wrong in (0.0, -0.1, 0.3, float("nan")):
        with pytest.raises(UserError, match="must be above 0 and below 0.2887"):
            power_exponent(wrong)


@pytest.mark.parametrize("name", ["0.9", "0.999", "power-0.05", "power-0.2"])
def test_shares_are_those_of_the_recursion(name):
    steps, saved = 60, 45
    # An average of unit vectors holds its weights.
    weights = recursion(np.eye(saved + 1), name)
    # Weight of the parameters before update 1, ..., saved.
    before = np.cumsum(weights)[:-1]
    np.testing.assert_allclose(missing_shares(name, saved, 1, saved), before, atol=1e-12)
    np.testing.assert_allclose(missing_shares(name, saved, 20, saved), before[19:], atol=1e-12)
    # A snapshot knows nothing of later updates.
    if name.startswith("power"):
        np.testing.assert_array_equal(missing_shares(name, saved, saved + 1, steps), np.ones(steps - saved))


def test_power_averages_follow_the_recursion():
    values = np.cumsum(np.random.default_rng(0).normal(size=(200, 5)), axis=0)
    emas = {name: {"x": jnp.asarray(values[0], jnp.float32)} for name in TRACKS}
    step = jax.jit(lambda emas, value, t: update_power_emas(emas, {"x": value}, WIDTHS, t))
    for t, value in enumerate(values[1:]):
        emas = step(emas, jnp.asarray(value, jnp.float32), t)
    for name in TRACKS:
        assert emas[name]["x"].dtype == jnp.float32
        np.testing.assert_allclose(emas[name]["x"], recursion(values, name), rtol=2e-5, atol=1e-5)


def test_a_skipped_update_counts_as_one_without_change():
    settings = config_lib.defaults().optim
    settings.update({"warmup_steps": 0, "learning_rate": 0.1, "ema": (0.5,), "ema_power": (0.1,)})
    optimizer = optim.make_optimizer(settings, 100)
    state = create_state({"x": jnp.ones(3)}, optimizer, settings.ema, settings.ema_power)
    assert list(state.emas) == ["0.5", "power-0.1"]
    step = jax.jit(
        lambda state, loss: optim.apply_gradients(
            state, loss, {"x": jnp.arange(3.0)}, optimizer, settings.ema, settings.ema_power
        )
    )
    values = [np.ones(3)]
    for loss in (1.0, 1.0, np.nan, 1.0, np.nan, np.nan, 1.0):
        before, state = state, step(state, jnp.float32(loss))
        values.append(np.asarray(state.params["x"], np.float64))
        if np.isnan(loss):
            np.testing.assert_array_equal(state.emas["0.5"]["x"], before.emas["0.5"]["x"])
    np.testing.assert_allclose(
        state.emas["power-0.1"]["x"], recursion(np.array(values), "power-0.1"), rtol=1e-6
    )


def test_fits_by_chunks_equal_a_fit_of_all_steps(monkeypatch):
    basis = [(name, at) for at in (100, 200, 300) for name in TRACKS]
    shares = np.stack([missing_shares(name, at, 1, 300) for name, at in basis], axis=1)
    target = missing_shares("0.99", 300, 1, 300)
    expected, *_ = np.linalg.lstsq(shares, target, rcond=None)
    residual = np.linalg.norm(shares @ expected - target) / np.linalg.norm(target)
    monkeypatch.setattr(posthoc_ema, "_CHUNK", 37)
    found = fit("0.99", 300, basis)
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-6)
    assert found.residual == pytest.approx(residual, rel=1e-6)
    # One of the basis.
    assert fit("power-0.1", 300, basis).residual < 1e-6
    # Nothing trained yet.
    assert fit("0.97", 0, [("power-0.05", 0)]).residual == 0.0


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_fits_give_the_averages_of_other_walks(drift):
    steps, every, rng = 1000, 40, np.random.default_rng(2)
    values = 5 + np.cumsum(rng.normal(size=(steps + 1, 40)) + drift * rng.normal(size=40), axis=0) / 20
    basis = [(name, at) for at in range(every, steps + 1, every) for name in TRACKS]
    averages = np.stack([recursion(values[: at + 1], name) for name, at in basis])
    for wanted in (*map(ema_name, (0.9, *DECAYS)), "power-0.08", "power-0.25"):
        found = fit(wanted, steps, basis)
        rebuilt = values[-1] + found.coefficients @ (averages - values[-1])
        kept = recursion(values, wanted)
        assert np.linalg.norm(rebuilt - kept) < 0.01 * np.linalg.norm(kept)
        # The fit predicts the error that is measured, but for chance.
        off = np.linalg.norm(rebuilt - kept) / np.linalg.norm(kept - values[-1])
        assert off < 2 * found.residual + 1e-4
        if wanted != "0.9":
            assert found.residual < 0.01 * every / 20


def run_config(**changes):
    config = config_lib.load("shapes:smoke").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(
        {"optim.ema_power": WIDTHS, "eval.every": 0, "log.tensorboard": False} | changes
    )
    return config


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """2,000 steps of a random walk with drift: (workdir, its raw values float64 [2001, 40])."""
    workdir, steps = tmp_path_factory.mktemp("walk"), 2000
    rng = np.random.default_rng(1)
    values = 5 + np.cumsum(rng.normal(size=(steps + 1, 40)) + 0.1 * rng.normal(size=40), axis=0) / 20
    config = run_config(**{"checkpoint.ema_every": 100})
    raw, every = values.astype(np.float32), 100

    def advance(emas, at):
        return update_power_emas(emas, {"x": at[0]}, WIDTHS, at[1]), None

    walked = jax.jit(lambda emas, *steps: jax.lax.scan(advance, emas, steps)[0])
    emas = {name: {"x": jnp.asarray(raw[0])} for name in TRACKS}
    with (
        Snapshots(Workdir(workdir).ema_snapshots, config) as snapshots,
        Checkpoints(Workdir(workdir).checkpoints) as store,
    ):
        for step in range(0, steps + 1, every):
            if step:
                emas = walked(emas, raw[step - every + 1 : step + 1], np.arange(step - every, step))
            state = TrainState(
                step=jnp.int32(step), params={"x": jnp.asarray(raw[step])}, opt_state=(), emas=emas
            )
            snapshots.save(step, state)
            if step in (1000, steps):
                store.save(step, state)
    return workdir, values


@pytest.mark.parametrize(
    ("step", "wanted"),
    [(1000, "0.99")]
    + [pytest.param(2000, wanted, marks=pytest.mark.slow) for wanted in ("0.999", "power-0.2")],
)
def test_any_average_is_rebuilt_from_two(walk, wanted, step, capsys):
    workdir, values = walk
    with Checkpoints(Workdir(workdir).checkpoints, read_only=True) as store:
        raw = {"x": jnp.asarray(values[step], jnp.float32)}
        rebuilt = posthoc_ema.rebuild(Workdir(workdir).ema_snapshots, store, step, raw, wanted, TRACKS)["x"]
    assert f"rebuilt EMA {wanted} from " in capsys.readouterr().err
    kept = recursion(values[: step + 1], wanted)
    error = np.linalg.norm(np.asarray(rebuilt, np.float64) - kept)
    assert error < 0.01 * np.linalg.norm(kept)
    # It is that average, not just near the parameters.
    assert error < 0.02 * np.linalg.norm(kept - values[step])


def test_what_snapshots_do_not_tell_is_refused(walk):
    workdir, values = walk
    with Checkpoints(Workdir(workdir).checkpoints, read_only=True) as store:
        raw = {"x": jnp.asarray(values[2000], jnp.float32)}
        message = (
            r"cannot rebuild EMA 0.5 from 20 .*up to step 2000: off by \d\d.*config.checkpoint.ema_every"
        )
        with pytest.raises(UserError, match=message):
            posthoc_ema.rebuild(Workdir(workdir).ema_snapshots, store, 2000, raw, "0.5", TRACKS)


def test_snapshots_are_kept_made_again_and_off_by_default(tmp_path):
    config = run_config(**{"checkpoint.ema_every": 2})

    def state(step, value):
        emas = {name: {"x": jnp.full(2, value)} for name in [*TRACKS, "0.995"]}
        return TrainState(step=jnp.int32(step), params={}, opt_state=(), emas=emas)

    path = epath.Path(tmp_path) / "snapshots"
    with Snapshots(path, config) as snapshots:
        for step in range(9):
            snapshots.save(step, state(step, float(step)))
        snapshots.wait()
    # Resumed from a checkpoint of step 5.
    with Snapshots(path, config) as snapshots:
        snapshots.back_to(5)
        for step in range(5, 8):
            snapshots.save(step, state(step, 10.0 + step))
        # Never changed.
        snapshots.save(4, state(4, -1.0))
    with Checkpoints(path, read_only=True) as store:
        assert store.all_steps() == [2, 4, 6]
        assert store.ema_names(6) == TRACKS
        found = [
            float(store.restore_params(s, {"x": jnp.zeros(2)}, ema=TRACKS[0])[0]["x"][0]) for s in (2, 4, 6)
        ]
    assert found == [2.0, 4.0, 16.0]
    with Snapshots(path.parent / "off", run_config(**{"optim.ema_power": ()})) as snapshots:
        snapshots.back_to(0)
        snapshots.save(100, state(100, 1.0))
        snapshots.wait()
    assert not (tmp_path.parent / "off").exists()


def test_names_of_averages(smoke_run):
    config = config_lib.resolve(run_config())
    known = {0.97: "0.97", "0.97": "0.97", "power-0.08": "power-0.08", 0: None, "none": None, 0.995: "0.995"}
    for given, name in known.items():
        assert find_ema(config, given) == name
    for wrong in (1.0, -0.5, "power-0.3", "power-x", "power-", "best", "nan"):
        with pytest.raises(
            UserError, match=f"no EMA of decay {wrong}; it keeps 0.995, power-0.05, power-0.1"
        ):
            find_ema(config, wrong)
    with pytest.raises(
        UserError, match=r"no EMA of decay 0.97; it keeps 0.995 .*config.optim.ema_power it could"
    ):
        scaling_dit.load(smoke_run, ema=0.97)
    for wrong in ((0.3,), (0.0,), (0.1, 0.1)):
        with pytest.raises(UserError, match="config.optim.ema_power .* above 0 and below 0.2887"):
            config_lib.resolve(run_config(**{"optim.ema_power": wrong}))


@pytest.mark.slow
def test_a_run_rebuilds_its_averages_and_a_resumed_one_the_same(tmp_path, monkeypatch):
    changes = {
        "steps": 9, "optim.ema": (0.8, 0.995), "sample.ema": 0.995, "checkpoint.every": 5, "checkpoint.ema_every": 2,
        "backbone.depth": 1, "mesh.data": 1, "mesh.fsdp": 2,
    }  # fmt: skip
    config = run_config(**changes)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    # Two, so that parameters are split: an average is placed as they are.
    devices = jax.devices()[:2]
    open_on_one_device(monkeypatch, count=2)
    scaling_dit.train(config, whole, devices)
    alone = scaling_dit.load(whole, ema="power-0.1").params
    # As a kill after step 8 leaves it: a checkpoint of step 5, newer snapshots, and one of them half made.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "9")
    shutil.rmtree(resumed / "ema_snapshots" / "6")
    scaling_dit.train(config, resumed, devices)
    # Read, and rebuilt.
    kept, made = (
        [scaling_dit.load(path, ema=ema).params for path in (whole, resumed)] for ema in (0.8, "power-0.07")
    )
    for first, second in (kept, made):
        jax.tree.map(np.testing.assert_array_equal, first, second)
    # The kept one, as if it were not kept.
    pipe = scaling_dit.load(whole)
    with Checkpoints(Workdir(whole).checkpoints, read_only=True) as store:
        rebuilt = posthoc_ema.rebuild(Workdir(whole).ema_snapshots, store, 9, pipe.params, "0.8", TRACKS)

    def length(a, b):
        # By numpy: jax would compile a difference for each shape.
        return (
            sum(
                float(np.sum((np.asarray(x) - np.asarray(y)) ** 2))
                for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
            )
            ** 0.5
        )

    assert length(rebuilt, kept[0]) < 0.1 * length(kept[0], pipe.params)
    assert length(alone, pipe.params) > 0
    for average, parameter in zip(*map(jax.tree.leaves, (rebuilt, pipe.params)), strict=True):
        assert average.sharding.is_equivalent_to(parameter.sharding, average.ndim)


@pytest.mark.parametrize(
    "steps, every, names",
    [
        (40_000, 100, ("0.9999", "power-0.07")),
        # Power averages are shares of a run, whatever its length.
        pytest.param(600_000, 500, ("0.9999",), marks=pytest.mark.slow),
    ],
)
def test_a_long_run_is_fitted_from_some_of_its_snapshots(steps, every, names):
    saved = thinned(range(every, steps, every), most=60)
    assert len(saved) <= 60 and saved == sorted(set(saved))
    assert saved[-1] == steps - every and saved[0] == every
    places = [(name, at) for at in [*saved, steps] for name in TRACKS]
    assert max(fit(name, steps, places).residual for name in names) < 0.01
    assert thinned([10, 20], most=60) == [10, 20]
