"""Shardings from logical names, and that a sharded step computes what one device computes."""

import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from scaling_dit import backbones, trees
from scaling_dit.backbones import contract, large_dit, next_dit, pixart, unet, unet_if, uvit
from scaling_dit.errors import UserError
from scaling_dit.parallel import rules
from scaling_dit.parallel.mesh import AXES, make_mesh

LAYOUTS = {
    "fsdp8": {"data": 1, "fsdp": 8},
    "data8": {"data": 8},
    "data2_fsdp4": {"data": 2, "fsdp": 4},
    "fsdp2_tensor2_context2": {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
}


class Block(nn.Module):
    """A residual MLP with the logical axes a backbone uses."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        kernel = nn.initializers.lecun_normal()
        h = nn.LayerNorm(scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)))(x)
        h = nn.Dense(4 * self.width, kernel_init=nn.with_logical_partitioning(kernel, ("embed", "mlp")))(h)
        h = nn.with_logical_constraint(nn.gelu(h), ("batch", "length", "act_mlp"))
        h = nn.Dense(self.width, kernel_init=nn.with_logical_partitioning(kernel, ("mlp", "embed")))(h)
        return nn.with_logical_constraint(x + h, ("batch", "length", "act_embed")), None


class Model(nn.Module):
    """Two scanned blocks between an unnamed and a named projection."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="user")(x)
        scan = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scan(self.width, name="blocks")(x, None)
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", None))
        return nn.Dense(6, kernel_init=init, name="head")(x)


def batch_of(rows=16):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(rows, 4, 6)).astype(np.float32),
        "y": rng.normal(size=(rows, 4, 6)).astype(np.float32),
    }


def loss(params, batch):
    return jnp.mean((Model().apply({"params": params}, batch["x"]) - batch["y"]) ** 2)


def abstract_params():
    return jax.eval_shape(Model().init, jax.random.key(0), jnp.zeros((1, 4, 6)))["params"]


def init(rng):
    return trees.unbox(Model().init(rng, jnp.zeros((1, 4, 6))))["params"]


def box(shape, *names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def spec(sizes, leaf):
    return rules.param_shardings(make_mesh(**sizes), leaf).spec


@pytest.mark.parametrize(
    "leaf, expected",
    [
        (box((16, 64), "embed", "mlp"), P("fsdp", "tensor")),
        (box((64, 16), "mlp", "embed"), P("tensor", "fsdp")),
        (box((2, 16, 32), "layers", "embed", "heads"), P(None, "fsdp", "tensor")),
        (box((16,), "norm"), P(None)),
        # Rows rather than columns, fsdp only once.
        (box((12, 16), "text", "embed"), P("fsdp", None)),
        (box((12, 8), "text", None), P("fsdp", None)),
        (box((16, 16), "embed", "embed"), P("fsdp", None)),
        # 6 does not split by 4, mlp is taken by tensor.
        (box((6, 64), "embed", "mlp"), P(None, "tensor")),
        # 6 does not split, so the largest that does.
        (box((6, 64), "embed", None), P(None, "fsdp")),
        # Never over the scanned axis.
        (box((8, 6, 3), "layers", "embed", None), P(None, None, None)),
        (box((16, 3), "embed", "heads"), P("fsdp", None)),
        # Placed nowhere on purpose.
        (box((4, 8), None, None), P(None, None)),
        # A name of the user's own.
        (box((12, 7), "my_axis", None), P("fsdp", None)),
        (jax.ShapeDtypeStruct((3, 8, 12), jnp.float32), P(None, None, "fsdp")),
        (jax.ShapeDtypeStruct((8, 9), jnp.float32), P("fsdp", None)),
        (jax.ShapeDtypeStruct((3, 5), jnp.float32), P(None, None)),
        (jax.ShapeDtypeStruct((), jnp.float32), P()),
    ],
)
def test_parameter_specs(leaf, expected):
    assert spec({"fsdp": 4, "tensor": 2}, leaf) == expected


def test_an_axis_that_no_device_shares_is_free_for_fsdp():
    assert spec({"data": 2, "fsdp": 4}, box((6, 64), "embed", "mlp")) == P(None, "fsdp")
    assert spec({"data": 8}, box((16, 64), "embed", "mlp")) == P(None, None)


def test_every_rule_maps_to_mesh_axes():
    for _, axis in rules.logical_rules():
        assert axis is None or set(axis if isinstance(axis, tuple) else (axis,)) <= set(AXES)


@pytest.fixture(scope="module")
def one_device():
    """Parameters, and their loss and gradients on one device."""
    params = jax.jit(init)(jax.random.key(0))
    return params, *jax.jit(jax.value_and_grad(loss))(params, batch_of())


@pytest.mark.parametrize(
    "sizes",
    # At once the one of three axes, which splits tokens and products as well as parameters.
    [
        pytest.param(sizes, id=name, marks=[pytest.mark.slow] * ("tensor" not in sizes))
        for name, sizes in LAYOUTS.items()
    ],
)
def test_sharded_loss_and_gradients_equal_one_device(sizes, one_device):
    params, expected, expected_grads = one_device
    mesh = make_mesh(**sizes)
    shardings = rules.param_shardings(mesh, abstract_params())
    data = rules.batch_sharding(mesh)
    step = jax.jit(jax.value_and_grad(loss), in_shardings=(shardings, data), out_shardings=(None, shardings))
    with rules.activate(mesh):
        value, grads = step(jax.device_put(params, shardings), rules.to_global(batch_of(), mesh, 16))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected_grads)
    kernel = grads["blocks"]["Dense_0"]["kernel"]
    per_device = kernel.addressable_shards[0].data.size
    assert per_device == kernel.size // (mesh.shape["fsdp"] * mesh.shape["tensor"])


def test_parameters_are_born_sharded_with_the_values_of_one_device(one_device):
    shardings = rules.param_shardings(make_mesh(data=2, fsdp=4), abstract_params())
    sharded = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    # The random bits are the same. What log and erf_inv make of them may differ by some last bits (3 were seen): XLA
    # vectorises for the shape a device holds, on one device too, and with that chooses where products are fused.
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, maxulp=8), sharded, one_device[0])
    assert len(sharded["user"]["kernel"].addressable_shards) == 8


def test_activate_keeps_the_constraints():
    mesh = make_mesh(data=2, fsdp=4)
    plain = trees.unbox(abstract_params())
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch_of())

    def constraints():
        return jax.jit(lambda p, b: loss(p, b)).lower(plain, batch).as_text().count("sharding_constraint")

    with rules.activate(mesh):
        # The two of Block; its body is scanned.
        assert constraints() == 2
    assert constraints() == 0


class State(struct.PyTreeNode):
    step: jax.Array
    params: typing.Any
    opt_state: typing.Any
    emas: dict[str, typing.Any]


def test_moments_and_emas_lie_where_their_parameter_lies():
    mesh = make_mesh(data=1, fsdp=8)
    boxed = {"backbone": abstract_params()}
    params = trees.unbox(boxed)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(
            optax.adamw(optax.linear_schedule(0.0, 1.0, 10)), lambda p: jax.tree.map(lambda _: True, p)
        ),
    )
    state = jax.eval_shape(
        lambda p: State(jnp.zeros((), jnp.int32), p, optimiser.init(p), {"0.99": p, "0.9": p}), params
    )
    by_param = rules.param_shardings(mesh, boxed)
    shardings = rules.state_shardings(mesh, state, by_param)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert shardings.params == by_param
    assert shardings.emas == {"0.99": by_param, "0.9": by_param}
    assert shardings.step.spec == P()
    moments = [s.spec for s in jax.tree.leaves(shardings.opt_state)]
    of_params = [s.spec for s in jax.tree.leaves(by_param)]
    # The two counters.
    assert moments.count(P()) == len(moments) - 2 * len(of_params)
    assert sorted(map(str, moments)) == sorted(map(str, [*of_params, *of_params, P(), P()]))
    placed = jax.jit(lambda p: optimiser.init(p), out_shardings=shardings.opt_state)(
        jax.tree.map(jnp.zeros_like, params)
    )
    assert len(jax.tree.leaves(placed)) == len(moments)


def test_a_moment_of_another_shape_is_replicated():
    mesh = make_mesh(data=1, fsdp=8)
    params = {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    state = {"params": params, "row": {"w": jax.ShapeDtypeStruct((16,), jnp.float32)}, "mu": params}
    shardings = rules.state_shardings(mesh, state, rules.param_shardings(mesh, params))
    assert shardings["mu"]["w"].spec == P("fsdp", None)
    assert shardings["row"]["w"].spec == P()


def test_local_positions_are_the_devices_rows_once():
    assert rules.local_positions(make_mesh(data=2, fsdp=4), 16).tolist() == list(range(16))
    assert rules.local_positions(make_mesh(data=2, fsdp=2, tensor=2), 12).tolist() == list(range(12))


def test_local_positions_of_a_process_with_scattered_devices(monkeypatch):
    mesh = make_mesh(data=4, fsdp=1, tensor=2)
    sharding = rules.batch_sharding(mesh)
    mine = {mesh.devices[3, 0, 0, 0], mesh.devices[1, 0, 0, 0], mesh.devices[1, 0, 0, 1]}
    held = {d: i for d, i in sharding.addressable_devices_indices_map((8,)).items() if d in mine}
    monkeypatch.setattr(type(sharding), "addressable_devices_indices_map", lambda self, shape: held)
    assert rules.local_positions(mesh, 8).tolist() == [2, 3, 6, 7]


def test_to_global_puts_each_row_on_its_device():
    mesh = make_mesh(data=2, fsdp=4)
    rows = np.arange(16, dtype=np.int32)[:, None] * np.ones((1, 3), np.int32)
    batch = rules.to_global({"ids": rows, "conditions": {"edge": (rows, rows[:, 0] > 3)}}, mesh, 16)
    np.testing.assert_array_equal(batch["ids"], rows)
    assert batch["conditions"]["edge"][1].shape == (16,)
    for shard in batch["ids"].addressable_shards:
        assert shard.data.shape == (2, 3)
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert batch["ids"].sharding.is_equivalent_to(rules.batch_sharding(mesh), 2)


@pytest.mark.parametrize("batch, rounded", [(1, 8), (8, 8), (9, 16)])
def test_a_batch_is_rounded_up_to_what_the_mesh_splits(batch, rounded):
    mesh = make_mesh(data=2, fsdp=4)
    assert rules.round_batch(mesh, batch) == rounded == len(rules.local_positions(mesh, rounded))
    assert rules.round_batch(make_mesh(data=1, tensor=8), batch) == batch


def test_a_batch_that_does_not_divide_is_reported_in_one_line():
    mesh = make_mesh(data=2, fsdp=4)
    for call in (lambda: rules.local_positions(mesh, 12), lambda: rules.to_global(batch_of(12), mesh, 12)):
        with pytest.raises(UserError, match=r"batch 12 .*data=2 x fsdp=4 = 8 .*: 16"):
            call()


def test_what_stays_whole_is_reported():
    mesh = make_mesh(data=2, fsdp=4)
    variables = {
        "kernel": box((16, 64), "embed", "mlp"),
        "norm": box((16,), "norm"),
        "odd": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16),
    }
    found = rules.replicated(mesh, variables)
    assert found.total == 16 * 64 * 4 + 16 * 4 + 3 * 5 * 2
    assert found.whole == 16 * 4 + 3 * 5 * 2
    assert found.largest == (("norm", 64), ("odd", 30))
    assert str(found) == "2.24% of 4,190 bytes of parameters are whole on every device, norm 64, odd 30"
    assert rules.replicated(mesh, variables, most=1).largest == (("norm", 64),)
    assert rules.replicated(make_mesh(), variables).whole == found.total


def test_a_module_without_names_is_split_by_size():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(64, (3, 3))(x)
            return nn.Dense(24)(nn.relu(x))

    variables = jax.eval_shape(Plain().init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)))
    mesh = make_mesh(data=1, fsdp=8)
    specs = {path[1:]: s.spec for path, s in trees.by_path(rules.param_shardings(mesh, variables)).items()}
    assert specs[("Conv_0", "kernel")] == P(None, None, None, "fsdp")
    assert specs[("Dense_0", "kernel")] == P("fsdp", None)
    assert rules.replicated(mesh, variables).whole == 0


FSDP64 = AbstractMesh((1, 64, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
# UNets that have the widths of another of them and more or fewer blocks: what is split follows from widths.
DEEPER = ("td2", "td4", "td12", "td14", "td4_4", "td4_8", "td4_12")
# And those of widths that another form of UNet has as well.
SHARED = ("sd2", "sdxl", "if-xl-c512")
SIZES = [
    # One of each family here but the UNets, which take seconds to trace; the others where time does not count.
    pytest.param(
        module.__name__.rsplit(".", 1)[-1],
        size,
        marks=[pytest.mark.slow] * (i > 0 or module in (unet, unet_if)),
    )
    for module in (uvit, pixart, large_dit, next_dit, unet, unet_if)
    for i, size in enumerate(module.SIZES)
    if size.rsplit("-", 1)[-1] not in DEEPER and size not in SHARED
]


@pytest.mark.parametrize("name, size", SIZES)
def test_less_than_a_hundredth_of_any_named_size_stays_whole(name, size):
    fields = {} if name == "unet_if" else {"scan_layers": True}
    backbone = backbones.create(name, size=size, **fields)
    inputs = contract.example_inputs(backbone, (32, 32, 4), (77, backbone.text_dim))
    variables = jax.eval_shape(backbone.init, jax.random.key(0), *inputs)
    found = rules.replicated(FSDP64, variables)
    assert found.whole < 0.01 * found.total, str(found)


def test_without_tensor_parallelism_rows_are_split_and_not_lanes():
    sizes = {"fsdp": 8}
    assert spec(sizes, box((64, 16), "mlp", "embed")) == P("fsdp", None)
    assert spec(sizes, box((5, 3, 64, 16), "layers", None, "heads", "embed")) == P(None, None, "fsdp", None)
    # Rows of words are looked up.
    assert spec(sizes, box((64, 16), "vocab", "embed")) == P(None, "fsdp")
    assert spec(sizes, box((8, 16), None, "embed")) == P(None, "fsdp")
    # Layers are never split.
    assert spec(sizes, box((8, 16), "layers", "embed")) == P(None, "fsdp")
    # 12 does not divide.
    assert spec(sizes, box((12, 16), "mlp", "embed")) == P(None, "fsdp")
