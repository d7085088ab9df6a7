"""The mesh: axis sizes, filling, and one-line errors with the numbers in them."""

import jax
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
    "sizes, told",
    [
        ({"data": 3, "fsdp": 2}, ["multiply to 6", "8 devices", "-1"]),
        ({"data": -1, "fsdp": 3}, ["parts of 3", "divisor of 8", "data"]),
        ({"data": -1, "fsdp": -1}, ["at most one", "data=-1, fsdp=-1"]),
        ({"data": 0}, ["data=0", "at least 1"]),
        ({"data": 8, "tensor": -2}, ["tensor=-2", "at least 1"]),
    ],
)
def test_wrong_sizes_give_one_line(sizes, told):
    with pytest.raises(UserError) as error:
        make_mesh(**sizes)
    assert "\n" not in str(error.value)
    for part in told:
        assert part in str(error.value)
