"""Checks of a user's own schedule, objective, timestep sampling, sampler and guidance: every mistake in one line.

They run once, when a run is opened, on a few small arrays. The protocols are where the built-in parts are: `Schedule`,
`Prediction`, `Weighting`, `TimeSampling`, `Sampler` and `Guidance`; docs/own_parts.md shows one of each. `where` names
the part in every error line.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.components import check_methods, describe, one_line
from scaling_dit.errors import UserError

# The contract of a backbone: it sees timesteps in [0, 1000).
TIMESTEPS = 1000
_ROWS = 4
_SIDE = (3, 3, 2)


def check_schedule(schedule: Any, where: str) -> None:
    """Makes sure that this is a `Schedule`: coefficients in range, noisier with time, and with their inverse.

    Raises:
      UserError: it is not.
    """
    methods = {"coefficients": "timesteps", "alpha": "timesteps", "sigma": "timesteps"}
    check_methods(schedule, where, methods | {"timesteps_of": "noise_to_signal"})
    for name, kind in (("num_timesteps", int), ("continuous", bool), ("zero_terminal_snr", bool)):
        value = getattr(schedule, name, None)
        if not isinstance(value, kind):
            raise UserError(f"{where}: {name} is {value!r}; it must be of type {kind.__name__}")
    if schedule.num_timesteps != TIMESTEPS:
        raise UserError(
            f"{where}: num_timesteps is {schedule.num_timesteps}; it must be {TIMESTEPS}, which backbones expect"
        )
    times = np.arange(float(TIMESTEPS))
    alpha, sigma = _coefficients(schedule, times, where)
    _check_noise_levels(schedule, times, alpha, sigma, where)
    for name, wanted in (("alpha", alpha), ("sigma", sigma)):
        _check_factor(schedule, name, times, wanted, where)
    with np.errstate(divide="ignore"):
        ratio = sigma / alpha
    with one_line(f"{where}: timesteps_of()"):
        back = np.asarray(schedule.timesteps_of(ratio))
    _check_array(
        f"{where}: timesteps_of()", back, times.shape, "floating", f"noise_to_signal of shape {times.shape}"
    )
    off = np.abs(back - times)
    if not off.max() < 0.5:
        worst = int(np.argmax(np.where(np.isfinite(off), off, np.inf)))
        raise UserError(
            f"{where}: timesteps_of() gives {back[worst]:.6g} for the noise-to-signal ratio of timestep {worst}; it "
            "must be the inverse of coefficients()"
        )
    with one_line(f"{where}: timesteps_of()"):
        ends = np.asarray(schedule.timesteps_of(np.array([1e-4, 1e4])))
    if not (np.isfinite(ends).all() and (ends >= 0).all() and (ends <= TIMESTEPS).all()):
        raise UserError(
            f"{where}: timesteps_of() gives {ends.tolist()} for the ratios 0.0001 and 10000; it must stay within "
            f"[0, {TIMESTEPS}]"
        )


def check_prediction(prediction: Any, where: str) -> None:
    """Makes sure that this is a `Prediction`: both directions keep shapes, and each is the inverse of the other.

    Raises:
      UserError: it is not.
    """
    check_methods(
        prediction, where, {"to_x0_eps": "value, noisy, alpha, sigma", "from_x0_eps": "x0, eps, alpha, sigma"}
    )
    needs_signal = getattr(prediction, "needs_signal", None)
    if not isinstance(needs_signal, bool):
        raise UserError(
            f"{where}: needs_signal is {needs_signal!r}; it must be True if the prediction says nothing of the "
            "clean latents where no signal is left, as eps, else False"
        )
    x0, eps = _normal(0), _normal(1)
    alpha = jnp.array([0.99, 0.8, 0.6, 0.1]).reshape(-1, 1, 1, 1)
    sigma = jnp.sqrt(1 - jnp.square(alpha))
    with one_line(f"{where}: from_x0_eps()"):
        value = jax.jit(prediction.from_x0_eps)(x0, eps, alpha, sigma)
    _check_array(f"{where}: from_x0_eps()", value, x0.shape, "float32", f"latents of shape {x0.shape}")
    with one_line(f"{where}: to_x0_eps()"):
        back = jax.jit(prediction.to_x0_eps)(value, alpha * x0 + sigma * eps, alpha, sigma)
    if not (isinstance(back, tuple) and len(back) == 2):
        raise UserError(f"{where}: to_x0_eps() returned {describe(back)}; it must return (x0, eps)")
    for name, found, right in (("x0", back[0], x0), ("eps", back[1], eps)):
        _check_array(f"{where}: to_x0_eps()", found, x0.shape, "float32", f"latents of shape {x0.shape}")
        error = float(jnp.abs(found - right).max())
        if not error < 1e-2:
            raise UserError(
                f"{where}: to_x0_eps() of from_x0_eps() is {error:.3g} away from the {name} it was given; each must "
                "be the inverse of the other"
            )


def check_weighting(weighting: Any, spaces: tuple[str, ...], where: str) -> None:
    """Makes sure that this is a `Weighting`: a finite weight of 0 or more for each row, in a space that is known.

    Raises:
      UserError: it is not.
    """
    check_methods(weighting, where, {"__call__": "alpha, sigma, timesteps"})
    space = getattr(weighting, "space", None)
    if space not in spaces:
        raise UserError(
            f"{where}: space is {space!r}; it must name the error that the weight is for: {', '.join(spaces)}"
        )
    alpha = jnp.array([1.0, 0.7, 0.3, 1e-4])
    sigma = jnp.sqrt(jnp.maximum(1 - jnp.square(alpha), 1e-8))
    with one_line(f"{where}: the call"):
        weight = jax.jit(weighting)(alpha, sigma, jnp.array([0.0, 300.0, 700.0, 999.0]))
    _check_array(f"{where}: the call", weight, alpha.shape, "float32", f"alpha of shape {alpha.shape}")
    if not bool(jnp.all(weight >= 0)) or not bool(jnp.any(weight > 0)):
        raise UserError(
            f"{where}: the call gives the weights {np.asarray(weight).tolist()} for alpha {alpha.tolist()}; they must "
            "be 0 or more, and not all 0"
        )


def check_time_sampling(sampling: Any, schedule: Any, where: str) -> None:
    """Makes sure that this is a `TimeSampling`: timesteps within [0, T), other ones for another key.

    Raises:
      UserError: it is not.
    """
    check_methods(sampling, where, {"__call__": "rng, batch, schedule"})
    batch = 16
    with one_line(f"{where}: the call"):
        draw = jax.jit(lambda rng: sampling(rng, batch, schedule))
        first, second = draw(jax.random.key(0)), draw(jax.random.key(1))
    _check_array(f"{where}: the call", first, (batch,), "number", f"batch {batch}")
    if not bool(jnp.all((first >= 0) & (first <= schedule.num_timesteps))):
        raise UserError(
            f"{where}: the call gives timesteps from {float(first.min()):.6g} to {float(first.max()):.6g}; they must "
            f"lie within [0, {schedule.num_timesteps})"
        )
    if bool(jnp.all(first == second)):
        raise UserError(
            f"{where}: the call gives the same timesteps for two keys; it must draw from rng, with jax.random"
        )


def check_sampler(sampler: Any, schedule: Any, steps: int, where: str) -> None:
    """Makes sure that this is a `Sampler`: it can be scanned, row by row, and ends at what a model is sure of.

    Raises:
      UserError: it is not.
    """
    check_methods(
        sampler,
        where,
        {"table": "schedule, steps", "init": "noise, keys", "step": "denoise, latents, carry, row"},
    )
    with one_line(f"{where}: table()"):
        rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), sampler.table(schedule, steps))
    shapes = [np.shape(column) for column in jax.tree.leaves(rows)]
    if not shapes or not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
        raise UserError(
            f"{where}: table() returned columns of shapes {shapes}; each must have one entry a step of the sampler"
        )
    if not all(bool(jnp.isfinite(column).all()) for column in jax.tree.leaves(rows)):
        raise UserError(f"{where}: table() holds an entry that is not finite, for {steps} steps")

    def denoise(latents: Any, timestep: Any, alpha: Any, sigma: Any) -> tuple[jax.Array, jax.Array]:
        x0 = jnp.full_like(latents, 0.5)
        return x0, (latents - alpha * x0) / jnp.maximum(sigma, 1e-3)

    @jax.jit
    def run(noise: jax.Array, numbers: jax.Array) -> jax.Array:
        start = noise, sampler.init(noise, jax.vmap(jax.random.key)(numbers))
        return jax.lax.scan(lambda held, row: (_step(sampler, denoise, held, row, where), None), start, rows)[
            0
        ][0]

    noise, numbers = _normal(0), jnp.arange(_ROWS)
    with one_line(f"{where}: init() and step()"):
        final = run(noise, numbers)
    _check_rows(f"{where}: step()", run, (noise, numbers), (_normal(2), numbers + _ROWS))
    moved = float(jnp.abs(run(noise[::-1], numbers[::-1])[::-1] - final).max())
    if not moved < 1e-4:
        raise UserError(
            f"{where}: step() changes a row by {moved:.3g} when it stands elsewhere in the batch; draw the noise of "
            "each row from its own of the keys"
        )
    away = float(jnp.abs(final - 0.5).max())
    if not away < 0.25:
        raise UserError(
            f"{where}: for a model that is sure of the clean latents 0.5, {steps} steps end {away:.3g} away from them"
        )


def check_guidance(guidance: Any, where: str) -> None:
    """Makes sure that this is a `Guidance`: one prediction of the two, row by row.

    Raises:
      UserError: it is not.
    """
    check_methods(guidance, where, {"__call__": "positive, negative, latents, timesteps, scale"})
    times = jnp.array([0.0, 300.0, 700.0, 999.0])

    def run(positive: jax.Array, negative: jax.Array, latents: jax.Array) -> Any:
        return guidance(positive, negative, latents, times, 3.0)

    given = _normal(0), _normal(1), _normal(2)
    with one_line(f"{where}: the call"):
        combined = jax.jit(run)(*given)
    _check_array(
        f"{where}: the call", combined, given[0].shape, "float32", f"predictions of shape {given[0].shape}"
    )
    _check_rows(f"{where}: the call", jax.jit(run), given, (_normal(3), _normal(4), _normal(5)))


def _step(sampler: Any, denoise: Any, held: tuple[Any, Any], row: Any, where: str) -> tuple[Any, Any]:
    """One step of a sampler, which must return latents and carry as it was given them."""
    after = sampler.step(denoise, *held, row)
    if not (isinstance(after, tuple) and len(after) == 2):
        raise UserError(f"{where}: step() returned {describe(after)}; it must return (latents, carry)")
    for name, then, now in zip(("latents", "carry"), held, after, strict=True):
        shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree) for tree in (then, now)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{where}: step() was given {name} of {shapes[0]} and returned {shapes[1]}; shape and dtype must stay"
            )
    return after


def _coefficients(schedule: Any, times: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    with one_line(f"{where}: coefficients()"):
        found = schedule.coefficients(times)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise UserError(f"{where}: coefficients() returned {describe(found)}; it must return (alpha, sigma)")
    alpha, sigma = (np.asarray(factor) for factor in found)
    for factor in (alpha, sigma):
        _check_array(
            f"{where}: coefficients()", factor, times.shape, "floating", f"timesteps of shape {times.shape}"
        )
    return alpha, sigma


def _check_noise_levels(
    schedule: Any, times: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, where: str
) -> None:
    """alpha and sigma within [0, 1], noisier at each timestep, and nearly noise alone at the last."""
    slack = 1e-6
    for name, factor in (("alpha", alpha), ("sigma", sigma)):
        if factor.min() < -slack or factor.max() > 1 + slack:
            raise UserError(
                f"{where}: coefficients() gives {name} from {factor.min():.4g} to {factor.max():.4g}; it must lie "
                "within [0, 1]"
            )
    rise = np.diff(np.arctan2(sigma, alpha))
    if not (rise > 0).all():
        first = int(np.argmin(rise > 0))
        raise UserError(
            f"{where}: sigma / alpha does not rise from timestep {first} to {first + 1}; each timestep must hold more "
            "noise than the one before"
        )
    if sigma[-1] < 0.9:
        raise UserError(
            f"{where}: sigma is {sigma[-1]:.4g} at timestep {times[-1]:.0f}; it must be at least 0.9, because samplers "
            "start from noise alone"
        )
    last = float(_coefficients(schedule, np.array([float(TIMESTEPS)]), where)[0][0])
    if (last == 0) != schedule.zero_terminal_snr:
        raise UserError(
            f"{where}: zero_terminal_snr is {schedule.zero_terminal_snr}, and alpha is {last:.4g} at timestep "
            f"{TIMESTEPS}; it must be True where that is 0, and only there"
        )


def _check_factor(schedule: Any, name: str, times: np.ndarray, wanted: np.ndarray, where: str) -> None:
    """`alpha` or `sigma` on the device: as `coefficients`, whatever the type and shape of the timesteps."""
    for given in (jnp.asarray(times, jnp.float32), jnp.asarray(times, jnp.int32).reshape(-1, 4)):
        with one_line(f"{where}: {name}()"):
            found = jax.jit(getattr(schedule, name))(given)
        _check_array(
            f"{where}: {name}()",
            found,
            given.shape,
            "float32",
            f"timesteps {given.dtype} of shape {given.shape}",
        )
        away = float(np.abs(np.asarray(found).ravel() - wanted).max())
        if not away < 1e-4:
            raise UserError(f"{where}: {name}() is {away:.3g} away from what coefficients() gives")


def _check_array(what: str, found: Any, shape: tuple[int, ...], kind: str, given: str) -> None:
    """An array of this shape and a dtype of this kind ("float32", "floating", "number"), all of it finite."""
    if not isinstance(found, jax.Array | np.ndarray):
        raise UserError(
            f"{what} returned {describe(found)} for {given}; it must return an array of shape {shape}"
        )
    if found.shape != shape:
        raise UserError(f"{what} returned shape {found.shape} for {given}; it must return shape {shape}")
    if not jnp.issubdtype(found.dtype, getattr(jnp, kind)):
        raise UserError(f"{what} returned {found.dtype} for {given}; it must return {kind} values")
    if not bool(np.isfinite(np.asarray(found)).all()):
        raise UserError(f"{what} returned a value that is not finite for {given}")


def _check_rows(what: str, run: Callable[..., Any], given: tuple[Any, ...], others: tuple[Any, ...]) -> None:
    """Row 0 of a result must not depend on the other rows: an image is the same in any batch."""
    mixed = [jnp.concatenate([one[:1], other[1:]]) for one, other in zip(given, others, strict=True)]
    away = float(jnp.abs(run(*given)[0] - run(*mixed)[0]).max())
    if not away < 1e-4:
        raise UserError(
            f"{what} changes row 0 by {away:.3g} when only other rows of the batch change; each image must depend on "
            "its own row alone"
        )


def _normal(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (_ROWS, *_SIDE))
