"""The mesh: axis sizes, filling, and one-line errors with the numbers in them."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from scaling_dit.errors import UserError
from scaling_dit.parallel.mesh import AXES, make_mesh


def test_default_puts_all_devices_on_data():
    mesh = make_mesh()
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}


def test_axes_are_auto():
    assert make_mesh().axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({"data": -1, "fsdp": 4}, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 1, 2)),
        ({"data": 2, "fsdp": 2, "context": 2, "tensor": 1}, (2, 2, 2, 1)),
    ],
)
def test_one_axis_fills(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.devices.shape == shape
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_some_devices_only():
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    assert mesh.devices.shape == (1, 2, 1, 1)
    assert make_mesh(devices=jax.devices()[3:4]).devices.item().id == 3


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({"data": 3, "fsdp": 2}, ["multiply to 6", "8 devices", "-1"]),
        ({"data": -1, "fsdp": 3}, ["parts of 3", "divisor of 8", "data"]),
        ({"data": -1, "fsdp": -1}, ["at most one", "data=-1, fsdp=-1"]),
        ({"data": 0}, ["data=0", "at least 1"]),
        ({"data": 8, "tensor": -2}, ["tensor=-2", "at least 1"]),
        ({"data": 2, "fsdp": 4, "slices": 4}, ["slices=4", "data=2", "multiple"]),
        ({"slices": 0}, ["slices=0"]),
    ],
)
def test_wrong_sizes_give_one_line(sizes, expected):
    with pytest.raises(UserError) as error:
        make_mesh(**sizes)
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)


def ids(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices)


def test_only_data_crosses_slices():
    mesh = make_mesh(data=4, fsdp=2, slices=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    assert set(ids(mesh)[:2].flat) == {0, 1, 2, 3}
    assert set(ids(mesh)[2:].flat) == {4, 5, 6, 7}


def test_devices_that_know_their_slice_are_grouped_by_it(monkeypatch):
    layout = "scaling_dit.parallel.mesh.mesh_utils.create_device_mesh"
    monkeypatch.setattr(layout, lambda shape, devices, **_: np.array(devices, object).reshape(shape))
    monkeypatch.setattr(
        "scaling_dit.parallel.mesh.Mesh", lambda grid, *_, **__: SimpleNamespace(devices=grid)
    )
    devices = [SimpleNamespace(id=i, slice_index=i % 2, platform="tpu") for i in range(8)]
    mesh = make_mesh(fsdp=4, slices=2, devices=devices)
    assert ids(mesh).reshape(2, 4).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(UserError, match=r"slices=1, but the devices lie in 2; set mesh.slices=2"):
        make_mesh(fsdp=4, devices=devices)
    with pytest.raises(UserError, match=r"slices=2, but the devices lie in 1; set mesh.slices=1"):
        make_mesh(fsdp=2, slices=2, devices=devices[::2])


def test_context_becomes_part_of_data_where_tokens_cannot_be_split():
    sizes = {"data": 2, "fsdp": 2, "context": 2}
    split, whole = make_mesh(**sizes), make_mesh(**sizes, splits_tokens=False)
    assert dict(whole.shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    # Neighbours along context stay neighbours, and parameters are shared (fsdp) by the same devices.
    assert ids(whole)[:, :, 0, 0].tolist() == [
        ids(split)[data, :, context, 0].tolist() for data in (0, 1) for context in (0, 1)
    ]
