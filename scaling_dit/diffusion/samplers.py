"""From noise to latents: a sampler is a table of coefficients and a step that `sample` scans over it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from scaling_dit.components import Seam
from scaling_dit.diffusion import contract, sampler_tables
from scaling_dit.diffusion.predictions import Kind, check_prediction, to_x0_eps
from scaling_dit.diffusion.sampler_tables import Table
from scaling_dit.diffusion.sampling_fields import PUBLISHED
from scaling_dit.diffusion.schedules import Schedule
from scaling_dit.errors import UserError, nearest

# (latents [B, H, W, C], timesteps float32 [B]) -> prediction [B, H, W, C or 2C]
Predict = Callable[[jax.Array, jax.Array], jax.Array]
# (latents [B, H, W, C], timestep [], alpha [], sigma []) -> clean latents and noise, both [B, H, W, C]
Denoise = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# What a step hands to the next one, besides the latents: a pytree of arrays.
Carry = Any


class Sampler(Protocol):
    """A way from noise to latents. Each row of a batch goes its way alone: an image is the same in any batch.

    Latents stay in the scale of the schedule, alpha x0 + sigma eps.
    """

    def table(self, schedule: Schedule, steps: int) -> Any:
        """The coefficients of every step, on the host: a pytree of arrays, each [S], such as a `Table`.

        S is the number of steps that are scanned, as a rule `steps`. They become float32.
        """

    def init(self, noise: jax.Array, keys: jax.Array) -> Carry:
        """The first carry. `noise` [B, H, W, C] is what sampling starts from.

        `keys` [B] are random keys, one a row, for a sampler that adds noise; draw each row's from its own.
        """

    def step(self, denoise: Denoise, latents: jax.Array, carry: Carry, row: Any) -> tuple[jax.Array, Carry]:
        """The next latents [B, H, W, C] and carry, of the same shapes and dtypes.

        `row` is what `table` returned, [] in place of each [S]. `denoise(latents, timestep, alpha, sigma)` gives the
        clean latents and the noise that the guided model sees in latents of that noise level.
        """


class BuiltIn(NamedTuple):
    """A sampler made of functions; see `Sampler`.

    `multistep` says that the correction of a step needs the step before.
    """

    table: Callable[[Schedule, int], Table[np.ndarray]]
    init: Callable[[jax.Array, jax.Array], Carry]
    step: Callable[[Denoise, jax.Array, Any, Table[jax.Array]], tuple[jax.Array, Carry]]
    multistep: bool = False


def first_order_step(
    denoise: Denoise, latents: jax.Array, carry: Carry, row: Table[jax.Array]
) -> tuple[jax.Array, Carry]:
    """DDIM without noise (Song et al. 2021, eq. 12 with eta = 0), which is Euler's step too; one model call."""
    x0, eps = denoise(latents, row.timesteps, row.alpha, row.sigma)
    return row.alpha_next * x0 + row.sigma_next * eps, carry


def multistep(
    denoise: Denoise, latents: jax.Array, previous_x0: jax.Array, row: Table[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """DPM-Solver++(2M): x0 is extrapolated from the step before; one model call."""
    x0, eps = denoise(latents, row.timesteps, row.alpha, row.sigma)
    first = row.alpha_next * x0 + row.sigma_next * eps
    return first + row.correction * (x0 - previous_x0), x0


def heun_step(
    denoise: Denoise, latents: jax.Array, carry: Carry, row: Table[jax.Array]
) -> tuple[jax.Array, Carry]:
    """Heun's step; two model calls, or one where the row is of first order: 2 steps - 1 in all.

    With zero terminal SNR the first row is of first order too: 2 steps - 2.
    """
    x0, eps = denoise(latents, row.timesteps, row.alpha, row.sigma)
    first = row.alpha_next * x0 + row.sigma_next * eps

    def refined() -> jax.Array:
        x0_next, _ = denoise(first, row.timesteps_next, row.alpha_next, row.sigma_next)
        return first + row.correction * (x0_next - x0)

    return jax.lax.cond(row.correction != 0, refined, lambda: first), carry


def _nothing(noise: jax.Array, keys: jax.Array) -> Carry:
    return ()


def _zeros(noise: jax.Array, keys: jax.Array) -> Carry:
    return jnp.zeros_like(noise)


SAMPLERS: dict[str, Sampler] = {
    "ddim": BuiltIn(sampler_tables.ddim_table, _nothing, first_order_step),
    "dpmpp_2m": BuiltIn(sampler_tables.dpmpp_2m_table, _zeros, multistep, multistep=True),
    "euler": BuiltIn(sampler_tables.euler_table, _nothing, first_order_step),
    "heun": BuiltIn(sampler_tables.heun_table, _nothing, heun_step),
}
SEAM = Seam("sample.sampler", SAMPLERS)


def create_sampler(name: str, fields: Mapping[str, Any], schedule: Schedule, steps: int) -> Sampler:
    """The sampler called `name`, one of `SAMPLERS` or "package.module:Name" with its fields.

    Raises:
      UserError: unknown name or field, or a user's own that is none or that cannot take so many steps of `schedule`.
    """

    def check(sampler: Any, where: str) -> None:
        if name.startswith(PUBLISHED):
            # Its tests have checked it; its table refuses settings and steps that do not fit.
            sampler.table(schedule, steps)
        else:
            contract.check_sampler(sampler, schedule, steps, where)

    found: Sampler = SEAM.create(name, fields, lambda: SAMPLERS[name], check)
    return found


def find_sampler(sampler: str | Sampler) -> Sampler:
    """A sampler from the name of a built-in one; itself if it is one.

    Raises:
      UserError: there is none of that name.
    """
    if not isinstance(sampler, str):
        return sampler
    if sampler not in SAMPLERS:
        raise UserError(f"sample.sampler: unknown {sampler!r}; {nearest(sampler, SAMPLERS)}")
    return SAMPLERS[sampler]


def sample(
    predict: Predict,
    noise: jax.Array,
    schedule: Schedule,
    *,
    sampler: str | Sampler = "ddim",
    steps: int = 50,
    prediction: Kind = "eps",
    clip: bool = False,
    keys: jax.Array | None = None,
    image: jax.Array | None = None,
    strength: float = 1.0,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Latents float32 [B, H, W, C], a pure function (to be jitted) of standard normal `noise` of that shape.

    `predict` is the backbone with everything but latents and timesteps bound (see `guidance.guided`),
    `prediction` what it predicts. `clip` keeps the clean latents of every step within [-1, 1], which suits
    pixels, not VAE latents. Whatever the sampler, latents stay in the scale of the schedule, alpha x0 + sigma eps.
    `keys` [B] are random keys for a sampler that adds noise, which no built-in one does; those of the rows' numbers by
    default.

    With a `strength` below 1 only that share of the steps is taken, the last ones, from the latents `image`, of the
    shape of `noise`, noised to where these begin (SDEdit, arXiv 2108.01073). `known` are clean latents of that shape,
    and where they hold, bool [B, H, W, 1]: there they replace the clean latents of every step.

    Raises:
      UserError: unknown sampler or kind of prediction, one that the schedule does not allow, a number of steps the
        sampler cannot take, or a strength that it cannot have.
    """
    chosen = find_sampler(sampler)
    check_prediction(prediction, schedule)
    table = chosen.table(schedule, steps)
    noise = noise.astype(jnp.float32)
    if strength < 1:
        if image is None:
            raise UserError(f"strength is {strength}: give the image to start from")
        table = last_steps(sampler, table, steps, strength)
        noise = float(table.alpha[0]) * image.astype(jnp.float32) + float(table.sigma[0]) * noise
    rows = jax.tree.map(lambda column: jnp.asarray(column, jnp.float32), table)
    denoise = make_denoise(predict, prediction=prediction, clip=clip, known=known)
    keys = jax.vmap(jax.random.key)(jnp.arange(len(noise))) if keys is None else keys
    start = noise, chosen.init(noise, keys)
    (latents, _), _ = jax.lax.scan(lambda held, row: (chosen.step(denoise, *held, row), None), start, rows)
    return latents


def check_strength(sampler: str | Sampler, steps: int, strength: float) -> int:
    """The number of steps that a strength leaves of `steps`: its share of them, rounded down.

    Raises:
      UserError: none is left, or a sampler that cannot begin in the middle.
    """
    if strength >= 1:
        return steps
    chosen = SAMPLERS.get(sampler) if isinstance(sampler, str) else sampler
    if not isinstance(chosen, BuiltIn):
        raise UserError(
            f"strength is {strength}, and sampler {sampler!r} cannot begin in the middle; "
            f"choose one of {', '.join(SAMPLERS)}"
        )
    # A share such as 0.58 of 50 is 29, whatever its rounding.
    left = int(steps * strength + 1e-6)
    if not left:
        raise UserError(f"strength is {strength}: of {steps} steps it leaves none; raise it, or the steps")
    return left


def last_steps(sampler: str | Sampler, table: Any, steps: int, strength: float) -> Table[np.ndarray]:
    """The rows of a table that a strength leaves, as a sampler begins with them; raises as `check_strength`."""
    left = check_strength(sampler, steps, strength)
    rows: Table[np.ndarray] = jax.tree.map(lambda column: column[len(column) - left :], table)
    chosen = find_sampler(sampler)
    if isinstance(chosen, BuiltIn) and chosen.multistep:
        correction = rows.correction.copy()
        correction[0] = 0.0
        rows = rows._replace(correction=correction)
    return rows


def make_denoise(
    predict: Predict,
    *,
    prediction: Kind = "eps",
    clip: bool = False,
    known: tuple[jax.Array, jax.Array] | None = None,
) -> Denoise:
    """`predict` as a function that splits latents at one timestep into clean latents and noise, float32.

    A clipped x0 gives the noise that goes with it, so that alpha x0 + sigma eps is the input still (as
    guided diffusion does; diffusers: use_clipped_model_output=True). So do the known clean latents of `sample`.
    """

    def denoise(
        latents: jax.Array, timestep: jax.Array, alpha: jax.Array, sigma: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        output = predict(latents, jnp.full(latents.shape[:1], timestep, jnp.float32))
        value = output[..., : latents.shape[-1]].astype(jnp.float32)
        x0, eps = to_x0_eps(prediction, value, latents, alpha, sigma)
        if clip:
            x0, eps = to_x0_eps("x0", jnp.clip(x0, -1.0, 1.0), latents, alpha, sigma)
        if known is not None:
            x0, eps = to_x0_eps("x0", jnp.where(known[1], known[0], x0), latents, alpha, sigma)
        return x0, eps

    return denoise
