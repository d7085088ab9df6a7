"""Gathering by hand gives the loss and gradients of one device, and casts only what is read cast."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_dit import backbones, trees
from scaling_dit.errors import UserError
from scaling_dit.parallel import fsdp, rules
from scaling_dit.parallel.mesh import make_mesh
from tests.support.parity import example
from tests.support.uvit_golden import fill, run

FIELDS = {"hidden": 32, "depth": 2, "heads": 2}


def mean_loss(backbone):
    def loss(params, rows):
        prediction = backbone.apply({"params": params}, *rows)
        return (prediction * jnp.cos(prediction)).mean()

    return loss


@functools.cache
def one_device(depth):
    """(loss, its shapes, parameters, inputs, its value and gradients)."""
    backbone = backbones.create("uvit", text_dim=12, scan_layers=True, **(FIELDS | {"depth": depth}))
    inputs = example(backbone, 4, 4, batch=8)
    boxed = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)["params"]
    params, loss = fill(trees.unbox(boxed)), mean_loss(backbone)
    return loss, boxed, params, inputs, jax.device_get(run(jax.value_and_grad(loss), params, inputs))


@pytest.mark.parametrize(
    "depth, axes, torus, sparse_core",
    [
        # One block, where two are a stack of one on either side of it: compiling takes the time.
        (1, {"fsdp": 8, "data": 1}, (2, 2, 2), True),
        pytest.param(2, {"fsdp": 8, "data": 1}, (8,), False, marks=pytest.mark.slow),
        pytest.param(2, {"data": 2, "fsdp": 4}, (4,), False, marks=pytest.mark.slow),
        pytest.param(2, {"fsdp": 8, "data": 1}, (2, 2, 2), False, marks=pytest.mark.slow),
        pytest.param(2, {"fsdp": 8, "data": 1}, (4, 2), True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(depth, axes, torus, sparse_core, monkeypatch):
    monkeypatch.setattr(fsdp, "_torus", lambda coords: torus)
    loss, boxed, params, inputs, (wanted, wanted_grads) = one_device(depth)
    mesh = make_mesh(**axes)
    shardings = rules.param_shardings(mesh, boxed)
    params = jax.device_put(params, shardings)
    with rules.activate(mesh):
        found, grads = jax.jit(fsdp.value_and_grad(loss, mesh, shardings, sparse_core))(params, inputs)

    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for path, grad in trees.by_path(grads).items():
        one = trees.by_path(wanted_grads)[path]
        np.testing.assert_allclose(
            grad, one, atol=1e-4 * max(np.abs(one).max(), 1e-6), err_msg="/".join(path)
        )
        assert grad.sharding.is_equivalent_to(trees.by_path(shardings)[path], grad.ndim), path


def test_only_what_every_use_casts_is_gathered_in_the_narrower_type():
    backbone = backbones.create("uvit", text_dim=12, scan_layers=True, dtype="bfloat16", **FIELDS)
    inputs = example(backbone, 4, 4, batch=2)
    params = trees.unbox(jax.eval_shape(backbone.init, jax.random.key(0), *inputs)["params"])
    types = {
        "/".join(path): jnp.dtype(dtype).name
        for path, dtype in trees.by_path(fsdp.read_as(mean_loss(backbone), params, inputs)).items()
    }
    assert types["in_blocks/attn/qkv/kernel"] == types["out_blocks/mlp/fc1/kernel"] == "bfloat16"
    assert types["in_blocks/norm1/scale"] == types["decoder_pred/kernel"] == "float32"

    both = fsdp.read_as(
        lambda p, x: (p["w"].astype(jnp.bfloat16) * p["w"]).sum() + x, {"w": jnp.ones(3)}, 0.0
    )
    assert both == {"w": jnp.float32}


@pytest.mark.parametrize(
    "shape, torus",
    [((4, 4, 4), (4, 4, 4)), ((16, 16), (16, 16)), ((8,), (8,)), ((2, 1, 4), (2, 4))],
)
def test_the_dimensions_of_a_torus_are_read_off_the_coordinates(shape, torus):
    assert fsdp._torus(list(np.ndindex(shape))) == torus


def test_devices_in_no_order_make_one_ring():
    assert fsdp._torus([(0, 0), (1, 1), (0, 1), (1, 0)]) == (4,)
    assert fsdp._torus([None] * 4) == (4,)


def test_rings_are_planes_and_lines_of_the_torus(monkeypatch):
    mesh = make_mesh(data=1, fsdp=8)

    def stages(torus, sparse_core):
        monkeypatch.setattr(fsdp, "_torus", lambda coords: torus)
        return [[ring[0] for ring in rings] for rings in fsdp._rings(mesh, sparse_core)]

    plane, lines = [[0, 1], [0, 2, 4, 6]], [[0, 1], [0, 2], [0, 4]]
    assert stages((2, 2, 2), False) == [plane, plane]
    assert stages((2, 2, 2), True) == [lines, plane]
    assert stages((4, 2), False) == [[list(range(8))]] * 2
    assert stages((4, 2), True) == [[[0, 1], [0, 2, 4, 6]]] * 2


@pytest.mark.parametrize(
    "kind, gather_once, expected",
    [
        ("cpu", False, "for the gathers of sharding.gather_once, which is off"),
        ("TPU v5 lite", True, "sharding.sparse_core is for v5p and v6e; the mesh is of v5e"),
        ("TPU v4", True, "the mesh is of v4"),
    ],
)
def test_sparse_cores_are_refused_where_there_are_none_or_nothing_to_gather(kind, gather_once, expected):
    def mesh(kind):
        return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))

    for there in ("cpu", "TPU v5", "TPU v6 lite"):
        fsdp.check_sparse_core(mesh(there), True)
    with pytest.raises(UserError, match=expected):
        fsdp.check_sparse_core(mesh(kind), gather_once)


def test_only_meshes_that_split_nothing_but_the_batch_can_gather_once():
    fsdp.check_mesh(make_mesh(data=2, fsdp=4))
    for axes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}, {"data": 1, "fsdp": 4, "context": 2}):
        with pytest.raises(
            UserError, match="sharding.gather_once needs fsdp above 1, and context and tensor of 1"
        ):
            fsdp.check_mesh(make_mesh(**axes))
