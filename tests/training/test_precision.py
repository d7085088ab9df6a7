"""What a train step computes in float32 though products are bfloat16, read off the program of the step itself."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from scaling_dit import backbones, trees
from scaling_dit import config as config_lib
from scaling_dit.checkpoints.state import init_state
from scaling_dit.model.build import build_model, make_tokenizer
from scaling_dit.training import optim, program
from scaling_dit.training.step import make_train_step
from tests.support.layouts import FIELDS

MICROBATCHES = 2
# What loses digits in bfloat16: sums, and functions that are steep somewhere.
EXACT = {
    "reduce_sum", "reduce_max", "cumsum", "exp", "exp2", "expm1", "log", "log1p", "rsqrt", "sqrt", "div", "integer_pow",
    "square", "erf", "erfc", "tanh", "logistic", "sin", "cos",
}  # fmt: skip
IN_NORMS = EXACT | {"add", "sub", "mul", "max"}


def equations(jaxpr, scope=""):
    """(scope, equation) of a program and all that it calls; the scope is the modules' names, joined by "/"."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        yield here, eqn
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else (value,):
                body = getattr(body, "jaxpr", body)
                if hasattr(body, "eqns"):
                    yield from equations(body, here)


def dtypes(variables):
    return {getattr(variable.aval, "dtype", None) for variable in variables}


def narrow(eqn):
    """Whether an equation computes in bfloat16; to cast is not to compute."""
    return (
        jnp.dtype("bfloat16") in dtypes([*eqn.invars, *eqn.outvars])
        and eqn.primitive.name != "convert_element_type"
    )


def step_program(name, **modes):
    """(jaxpr of a train step of two microbatches, abstract state before it, abstract results)."""
    config = config_lib.load("experiments/shapes.py:smoke")
    with config.unlocked():
        config.backbone = ConfigDict({"name": name, "dtype": "bfloat16", **FIELDS[name], **modes})
        config.optim.update({"accumulate": MICROBATCHES, "ema": (0.995,), "ema_power": (0.1,)})
    config = config_lib.resolve(config)
    model = build_model(config, make_tokenizer(config))
    optimizer = optim.make_optimizer(config.optim, config.steps)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: init_state(model, optimizer, config, key), key)
    frozen = trees.unbox(jax.eval_shape(model.init, key)[1])
    batch = program.batch_shapes(config, model, program.run_mesh(config, jax.devices()[:1]))
    step = make_train_step(model, optimizer, config)
    closed, results = jax.make_jaxpr(step, return_shape=True)(state, frozen, dict(batch))
    return closed.jaxpr, state, results


@pytest.fixture(
    scope="module",
    # Each family's norms and attention are its own, so all are traced, most of them by the slow tests.
    params=[pytest.param((name, {}), marks=[pytest.mark.slow] * (name != "uvit")) for name in FIELDS]
    + [pytest.param(("uvit", {"scan_layers": True, "remat": "full"}), marks=pytest.mark.slow)],
    ids=lambda case: "-".join([case[0], *case[1]]),
)
def traced(request):
    """(class of the backbone, its program, all scopes and equations of it, state, results)."""
    name, modes = request.param
    jaxpr, *rest = step_program(name, **modes)
    return backbones.backbone_class(name).__name__, jaxpr, list(equations(jaxpr)), *rest


def test_every_backbone_is_here():
    assert set(FIELDS) == set(backbones.BACKBONES)


def test_norms_softmax_and_activations_are_float32(traced):
    _, _, everything, *_ = traced
    found = collections.Counter()
    for scope, eqn in everything:
        operation, norm = eqn.primitive.name, re.search(r"norm\w*\)*$", scope)
        found[operation, bool(norm), narrow(eqn)] += 1
        # The gradient of a bias is a sum over what was widened, in the type of the products: XLA's to accumulate.
        if operation == "reduce_sum" and "transpose(" in scope and not norm:
            continue
        assert not (narrow(eqn) and operation in (IN_NORMS if norm else EXACT)), (scope, eqn)
    # Of norms.
    assert found["rsqrt", True, False] and found["reduce_sum", True, False]
    # Of softmax.
    assert found["exp", False, False] and found["reduce_max", False, False]
    # And products are not.
    assert found["dot_general", False, True]


def test_only_the_backbone_computes_in_bfloat16(traced):
    """So noise, loss, its mean, clipping, moments, averages and the update do not."""
    backbone, _, everything, *_ = traced
    outside = [
        (scope, eqn.primitive.name)
        for scope, eqn in everything
        if narrow(eqn) and f"({backbone})" not in scope and not any(map(is_program, eqn.params.values()))
    ]
    assert not outside


def is_program(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_gradients_are_added_in_float32_over_microbatches(traced):
    _, jaxpr, _, state, _ = traced
    # The loss and each gradient.
    wanted = sorted([(), *(leaf.shape for leaf in jax.tree.leaves(state.params))])
    (loop,) = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "scan"
        and eqn.params["length"] == MICROBATCHES
        and len(eqn.outvars) == len(wanted)
    ]
    assert sorted(variable.aval.shape for variable in loop.outvars) == wanted
    body = loop.params["jaxpr"].jaxpr
    made_by = {variable: eqn for eqn in body.eqns for variable in eqn.outvars}
    for total in body.outvars:
        eqn = made_by[total]
        assert eqn.primitive.name == "add" and dtypes([*eqn.invars, total]) == {jnp.dtype("float32")}


def test_state_and_metrics_come_out_in_float32(traced):
    *_, state, (new_state, metrics) = traced
    assert jax.tree.map(lambda leaf: leaf.dtype, new_state) == jax.tree.map(lambda leaf: leaf.dtype, state)
    floats = {
        leaf.dtype
        for leaf in jax.tree.leaves((new_state, metrics))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    assert floats == {jnp.dtype("float32")} and metrics["loss"].dtype == jnp.float32
    assert len(new_state.emas) == 2


def test_a_norm_in_bfloat16_would_be_found():
    """The check of norms itself, on one that computes in the type of its input."""
    from flax import linen as nn

    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(dtype=jnp.bfloat16, force_float32_reductions=False, name="norm")(x)

    x = jnp.ones((2, 4), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda x: Wrong().init_with_output(jax.random.key(0), x)[0])(x).jaxpr
    assert any(
        narrow(eqn) and eqn.primitive.name in IN_NORMS and scope.endswith("norm")
        for scope, eqn in equations(jaxpr)
    )
