"""Slices by name, what their chips can do, and the XLA options they get."""

import dataclasses
import importlib.util
import types

import pytest

from scaling_dit.errors import UserError
from scaling_dit.parallel import topologies, xla_flags
from scaling_dit.parallel.topologies import CHIPS, GIB, LOCAL, TPUS, parse


@pytest.mark.parametrize(
    "text, slices, chips, hosts",
    [
        ("v5p:4x4x4", 1, 64, 16),
        ("v5e:16x16", 1, 256, 64),
        ("v5e:16x16", 2, 512, 128),
        ("v4:4x4x8", 1, 128, 32),
        ("v6e:16x16", 1, 256, 64),
        ("v5e:2x2", 1, 4, 1),
        ("tpu7x:4x4x4", 1, 64, 16),
        ("tpu7x:2x2x1", 2, 8, 2),
    ],
)
def test_chips_and_hosts(text, slices, chips, hosts):
    topology = parse(text, slices)
    assert (topology.chips, topology.hosts) == (chips, hosts)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("v5p-128", "give the shape of the slice, such as v5p:4x4x4"),
        ("v5q:4x4", "did you mean"),
        ("v5p:4x4", "3 numbers of chips, such as v5p:4x4x4"),
        ("v5e:4xfour", "2 numbers of chips, such as v5e:16x16"),
        ("v5e:0x4", "2 numbers of chips"),
        ("h200:8", "no generation 'h200'"),
        ("tpu7x-128", "give the shape of the slice, such as tpu7x:4x4x4"),
        ("v7x:4x4x4", "give the shape of the slice, such as tpu7x:4x4x4"),
        ("tpu7:4x4x4", "such as tpu7x:4x4x4"),
        ("ironwood", "such as tpu7x:4x4x4"),
        ("v5litepod-32", "such as v5e:16x16"),
        ("tpu7x:4x4", "3 numbers of chips, such as tpu7x:4x4x4"),
    ],
)
def test_a_shape_that_is_none_is_one_line(text, expected):
    with pytest.raises(UserError, match=f"--topology={text}") as error:
        parse(text)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_local_devices_are_a_topology():
    topology = parse(LOCAL)
    assert topology.chips == len(topology.devices()) == 8
    assert topology.chip is None and topology.hosts == 1


# Multiply-adds of one cycle: matrix units of a chip x their size, as the pages that CHIPS names state them.
UNITS = {"v4": 8 * 128 * 128, "v5e": 4 * 128 * 128, "v5p": 8 * 128 * 128}


@pytest.mark.parametrize("name", UNITS)
def test_a_peak_is_its_clock_times_its_units(name):
    chip = CHIPS[name]
    assert 2 * UNITS[name] * chip.clock == pytest.approx(chip.peak, rel=0.01)


def test_what_a_program_can_have_is_less_than_what_is_there():
    for chip in CHIPS.values():
        assert 0.93 * chip.hbm < chip.usable_hbm <= chip.hbm
    assert {name: round(CHIPS[name].hbm / GIB) for name in TPUS} == {
        "v4": 32,
        "v5e": 16,
        "v5p": 96,
        "v6e": 32,
        "tpu7x": 192,
    }


def test_a_chip_of_tpu7x_is_two_devices(monkeypatch):
    chip = CHIPS["tpu7x"]
    # The limit that the compiler of libtpu 0.0.51 reports.
    assert chip.device_hbm == int(94.74 * GIB) and CHIPS["v5p"].device_hbm == int(CHIPS["v5p"].usable_hbm)
    assert parse("tpu7x:2x2x1").devices_per_chip == 2 and parse("v5p:2x2x1").devices_per_chip == 1
    assert {chip.name for chip in CHIPS.values() if chip.unverified} == {"tpu7x"}
    fields = {field.name for field in dataclasses.fields(chip)}
    assert set(chip.unverified) <= fields and "peak" not in chip.unverified
    devices = [types.SimpleNamespace(device_kind="TPU7x")] * 8
    monkeypatch.setattr(topologies, "local_devices", lambda: devices)
    assert (parse(LOCAL).chips, parse(LOCAL).hosts) == (4, 1)


def test_devices_are_known_by_their_kind():
    for chip in CHIPS.values():
        assert topologies.find_chip(chip.kind) is chip
    assert topologies.find_chip("NVIDIA H200 141GB HBM3e") is CHIPS["h200"]
    assert topologies.find_chip("cpu") is None


def test_bandwidth_follows_the_torus():
    link = CHIPS["v5p"].link_bandwidth
    # 4800 Gbit/s.
    assert parse("v5p:4x4x4").ici_bandwidth((0, 1, 2)) == 6 * link
    assert parse("v5p:4x4x4").ici_bandwidth((1,)) == 2 * link
    # Lines, no rings.
    assert parse("v5p:2x2x4").ici_bandwidth((0, 1, 2)) == 3 * link
    assert parse("v5e:16x16").ici_bandwidth((0,)) == 2 * CHIPS["v5e"].link_bandwidth
    assert parse("v5e:8x16").ici_bandwidth((0, 1)) == 3 * CHIPS["v5e"].link_bandwidth
    assert parse("v6e:16x16").ici_bandwidth(()) == 4 * CHIPS["v6e"].link_bandwidth


def test_the_environment_is_set_for_descriptions_only():
    environment = {}
    topologies.prepare_environment([LOCAL], environment)
    assert environment == {}
    topologies.prepare_environment(["v5p:4x4x4", "v5e:2x2"], environment)
    assert environment["JAX_PLATFORMS"] == "cpu" and environment["TPU_SKIP_MDS_QUERY"] == "1"
    with pytest.raises(UserError, match="cannot go together"):
        topologies.prepare_environment([LOCAL, "v5e:2x2"], environment)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'scaling-dit\[tpu\]'"):
        topologies.prepare_environment(["v5p:4x4x4"], {})


def fake_devices(kind, slices=1):
    return [types.SimpleNamespace(device_kind=kind, slice_index=index % slices) for index in range(4)]


def test_options_go_by_generation_and_slices():
    assert xla_flags.options(fake_devices("cpu")) == xla_flags.options(fake_devices("NVIDIA H200")) == {}
    one, two = (xla_flags.options(fake_devices("TPU v5p", slices)) for slices in (1, 2))
    assert one and one.items() < two.items()
    of_v5p = [option for option in xla_flags.OPTIONS if "v5p" in option.chips]
    assert set(two) == {option.name for option in of_v5p if not option.sparse_core}
    assert set(xla_flags.options(fake_devices("TPU v5p", 2), sparse_core=True)) == {
        option.name for option in of_v5p
    }
    lite = fake_devices("TPU v5 lite")
    assert xla_flags.options(lite, sparse_core=True) == xla_flags.options(lite)


def test_no_option_is_known_to_be_refused_and_each_has_a_reason():
    for option in xla_flags.OPTIONS:
        assert len(option.reason) > 20 and set(option.chips) <= set(TPUS)
        assert option.name != "xla_tpu_overlap_compute_collective_tc" or option.chips == ("v5e",)
    names = [(option.name, chip) for option in xla_flags.OPTIONS for chip in option.chips]
    assert len(names) == len(set(names))
