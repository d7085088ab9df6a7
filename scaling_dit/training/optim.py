"""The optimizer: AdamW or a user's own, with warm-up, clipping, parameter groups, a guard against NaN, and averages.

A user's own takes the place of Adam alone: `config.optim.name` is "package.module:Name" of a function or class whose
arguments are plain values with defaults and which returns an `optax.GradientTransformation` from gradients to a
direction, as `optax.scale_by_lion` does. Clipping, weight decay, groups, the learning rate and the guard stay.

`optim` below is the config section of that name; see `config.defaults` for its fields.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from scaling_dit import trees
from scaling_dit.checkpoints.ema import update_emas, update_power_emas
from scaling_dit.checkpoints.state import TrainState
from scaling_dit.components import Seam, check_methods, one_line
from scaling_dit.config import parse_group
from scaling_dit.errors import UserError, nearest
from scaling_dit.trees import Params

# (regex over parameter paths, learning-rate factor, weight decay)
Group = tuple[str, float, float]

SEAM = Seam("optim.name", ("adamw",), filled=("total_steps",))


def make_optimizer(
    optim: ConfigDict, total_steps: int, fan_ins: Params | None = None
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter 2019), or `optim.name`, for `total_steps` updates.

    A non-finite gradient changes nothing.

    Gradients are clipped to a global norm of `clip_norm` (0 = not at all); frozen parameters do not count in
    the norm. `parameter_settings` says how `groups` set learning rate and weight decay. The learning rate
    follows the number of calls, skipped ones included, so that it is
    `learning_rate_schedule(...)(state.step)` always. Moments have exactly the structure of the parameters.
    Non-finite gradients are never let through, however many follow one another: stopping after
    `max_nonfinite` is up to the caller, who reads `nonfinite_count`. `update` takes `loss` [] too, which must be
    finite as well.

    Args:
      fan_ins: under muP, what the learning rate of each parameter is divided by and its decay multiplied by
        (`mup.fan_ins`); a tree shaped like the parameters.

    Raises:
      UserError: here for a bad schedule or a user's own that is no optimizer; from `init` for a group that is wrong or
        matches no parameter.
    """
    groups, weight_decay, text_rate = tuple(optim.groups), optim.weight_decay, optim.text_encoder_rate

    def settings(params: Params) -> tuple[Params, Params]:
        factors, decays = parameter_settings(params, groups, weight_decay, text_rate)
        if fan_ins is None:
            return factors, decays
        slower = jax.tree.map(lambda factor, m: factor / m, factors, fan_ins)
        return slower, jax.tree.map(lambda decay, m: decay * m, decays, fan_ins)

    def check_groups(params: Params) -> optax.OptState:
        settings(params)
        return optax.EmptyState()

    def drop_frozen(
        grads: Params, state: optax.OptState, params: Any = None
    ) -> tuple[Params, optax.OptState]:
        return jax.tree.map(
            lambda g, factor: g if factor else jnp.zeros_like(g), grads, settings(params)[0]
        ), state

    def decay_weights(updates: Params, params: Any) -> Params:
        return jax.tree.map(lambda u, p, decay: u + decay * p, updates, params, settings(params)[1])

    def scale_groups(updates: Params, params: Any) -> Params:
        return jax.tree.map(lambda u, factor: factor * u, updates, settings(params)[0])

    guarded = optax.chain(
        optax.GradientTransformation(check_groups, drop_frozen),
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        _direction(optim, total_steps),
        optax.stateless(decay_weights),
        optax.stateless(scale_groups),
    )
    return optax.chain(
        skip_nonfinite(guarded),
        optax.scale_by_learning_rate(learning_rate_schedule(optim, total_steps)),
    )


def _direction(optim: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Adam, or a user's own in its place; one that reads how long the run is has an argument `total_steps`."""

    def adam() -> optax.GradientTransformation:
        return optax.scale_by_adam(optim.b1, optim.b2, optim.eps)

    found: optax.GradientTransformation = SEAM.create(
        optim.name, optim.fields, adam, check_direction, total_steps=total_steps
    )
    return found


def check_direction(found: Any, where: str) -> None:
    """Makes sure that this is an `optax.GradientTransformation` from gradients to a direction to descend along.

    Raises:
      UserError: it is not; `where` names it.
    """
    check_methods(found, where, {"init": "params", "update": "updates, state, params"})
    shapes = {"layer": {"kernel": (6, 4), "bias": (4,)}, "table": (3, 2, 4)}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    params = jax.tree.map(jnp.ones, shapes, **is_shape)
    grads = jax.tree.map(lambda shape: jax.random.normal(jax.random.key(0), shape), shapes, **is_shape)
    with one_line(f"{where}: init() or update()"):
        state = found.init(params)
        updates, after = jax.jit(found.update)(grads, state, params)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)

    if described(updates) != described(grads):
        raise UserError(
            f"{where}: update() returned other shapes or dtypes than the gradients it was given; they must stay"
        )
    if described(after) != described(state):
        raise UserError(
            f"{where}: update() returned a state of other structure, shapes or dtypes than init(); they must stay"
        )
    along = sum(jnp.sum(u * g) for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True))
    if not float(along) > 0:
        raise UserError(
            f"{where}: update() leads uphill; it must return a direction that the run multiplies by minus the learning "
            "rate, as optax.scale_by_lion does and optax.lion does not"
        )


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`optax.apply_if_finite` without a limit, and with the same state, as fewer and smaller programs.

    One global norm, which clipping and the metrics take as well, shows values that are not finite, in place of a test
    of every entry; so squares that overflow float32 count as not finite too. Results are selected, not computed in a
    branch: the arguments and results of a branch are copied, and nothing outside fuses with it. This removes a third of
    all kernels of SDXL's train step (benchmarks/aot_log.md).
    """

    def init(params: Params) -> optax.OptState:
        # Two buffers, not one twice: a state is donated.
        none, in_all = (jnp.zeros([], jnp.int32) for _ in range(2))
        return optax.ApplyIfFiniteState(none, jnp.array(True), in_all, inner.init(params))

    def update(
        grads: Params, state: optax.OptState, params: Any = None, *, loss: jax.Array, **_: Any
    ) -> tuple[Params, optax.OptState]:
        # A loss can overflow where its gradient does not.
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(grads))
        updates, inner_state = inner.update(grads, state.inner_state, params)
        more = optax.safe_increment
        return jax.tree.map(lambda u: jnp.where(finite, u, 0), updates), optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, more(state.notfinite_count)),
            last_finite=finite,
            total_notfinite=jnp.where(finite, state.total_notfinite, more(state.total_notfinite)),
            inner_state=jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), inner_state, state.inner_state
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def learning_rate_schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
    """step -> learning rate: a line from 0 over `warmup_steps`, then constant or cosine.

    The cosine ends at `final_fraction` of `learning_rate` after `total_steps`.

    Raises:
      UserError: unknown `decay`, or a cosine without steps left after warm-up.
    """
    peak, warmup = optim.learning_rate, optim.warmup_steps
    if optim.decay == "constant":
        main = optax.constant_schedule(peak)
    elif optim.decay == "cosine":
        if warmup >= total_steps:
            raise UserError(
                f"optim.warmup_steps={warmup} leaves nothing of steps={total_steps} for cosine decay"
            )
        main = optax.cosine_decay_schedule(peak, total_steps - warmup, optim.final_fraction)
    else:
        raise UserError(
            f"optim.decay: unknown {optim.decay!r}; {nearest(optim.decay, ('constant', 'cosine'))}"
        )
    if warmup == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def parameter_settings(
    params: Params, groups: Sequence[Group], weight_decay: float, text_encoder_rate: float = 1.0
) -> tuple[Params, Params]:
    """Learning-rate factor and weight decay of each parameter, as two trees of floats shaped like `params`.

    A path is the tree's keys joined by "/", such as "backbone/in_blocks_0/attention/query/kernel". The first
    group whose regex is found in it (`re.search`) sets both values for it, exactly as written; factor 0
    freezes. A parameter in no group has factor 1, below "text_encoder" `text_encoder_rate`, and decays by
    `weight_decay` if it is called "kernel" (a matrix or convolution), not at all otherwise: biases, norms,
    embeddings and positional tables keep their size. The name decides, not the number of axes, because scanned
    layers stack their biases into matrices.

    Raises:
      UserError: a group is malformed, or no parameter is left for it.
    """
    patterns = [parse_group(group) for group in groups]
    matched = [0] * len(patterns)
    paths = jax.tree_util.tree_map_with_path(lambda path, _: "/".join(trees.names(path)), params)

    def setting(path: str) -> tuple[float, float]:
        for number, (pattern, factor, decay) in enumerate(patterns):
            if pattern.search(path):
                matched[number] += 1
                return factor, decay
        factor = text_encoder_rate if path.startswith("text_encoder/") else 1.0
        return factor, weight_decay if path.rpartition("/")[2] == "kernel" else 0.0

    settings = {path: setting(path) for path in jax.tree.leaves(paths)}
    for count, (pattern, _, _) in zip(matched, patterns, strict=True):
        if not count:
            parts = {path.partition("/")[0] for path in settings}
            raise UserError(
                f"optim.groups: {pattern.pattern!r} matches no parameter that an earlier group has not taken;"
                f" {nearest(pattern.pattern, parts)}"
            )
    return (
        jax.tree.map(lambda path: settings[path][0], paths),
        jax.tree.map(lambda path: settings[path][1], paths),
    )


def nonfinite_count(opt_state: optax.OptState) -> tuple[jax.Array, jax.Array]:
    """Updates skipped for a non-finite loss or gradient, int32 []: in a row up to now, and in total."""
    get = optax.tree_utils.tree_get
    return get(opt_state, "notfinite_count"), get(opt_state, "total_notfinite")


def apply_gradients(
    state: TrainState,
    loss: jax.Array,
    grads: Params,
    optimizer: optax.GradientTransformationExtraArgs,
    ema_decays: Iterable[float],
    ema_power: Iterable[float] = (),
) -> TrainState:
    """The state after one step of `optimizer`, which is of `make_optimizer`; pure.

    If `loss` [] or any of `grads` is not finite, parameters, moments and averages by decay stay as they are bit for
    bit; the step and `nonfinite_count` advance. Power averages take the parameters in once more: their weights
    then depend on the number of steps alone, so that `posthoc_ema` knows them.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=loss)
    params = optax.apply_updates(state.params, updates)
    emas = update_emas(state.emas, params, ema_decays, state.step)
    applied = nonfinite_count(opt_state)[0] == 0
    params, emas = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old),
        (params, emas),
        (state.params, {name: state.emas[name] for name in emas}),
    )
    emas |= update_power_emas(state.emas, params, ema_power, state.step)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, emas=emas)
