"""Verdicts on the facts of several hosts, with one fault each."""

import pytest

from scaling_dit.doctor.judge import judge
from scaling_dit.doctor.report import healthy


def fact(process, **changes):
    """The facts of a healthy host of four, each with four chips."""
    steps = {
        "losses": [1.5, 1.25, 1.0],
        "seconds": 0.5,
        "compile_seconds": 9.0,
        "attention": "21x21 tokens: short",
    }
    return {
        "process": process, "host": f"w-{process}", "local_devices": 4, "devices": 16, "devices_per_chip": 1,
        "kind": "TPU v5p", "versions": {"jax": "0.10.2", "flax": "0.12.0"}, "config": "abc",
        "storage": {"error": "", "seconds": 0.25, "clock": 0.0}, "clock": 0.0, "sum_error": "", "steps": steps,
    } | changes  # fmt: skip


def hosts(**changes):
    """Four hosts, of which the third is changed."""
    return [fact(process, **(changes if process == 2 else {})) for process in range(4)]


def words(facts, name, chips=None):
    return {check.name: check for check in judge(facts, chips)}[name]


def test_a_healthy_slice():
    checks = judge(hosts(), chips=16)
    assert healthy(checks) and all(check.passed for check in checks)
    found = {check.name: check.words for check in checks}
    assert found["devices"] == "4 hosts with 4 devices each, TPU v5p; every host sees all 16"
    assert found["packages"] == "equal on all hosts: jax 0.10.2, flax 0.12.0"
    assert found["steps"] == "3 steps, losses 1.5, 1.25, 1; 0.5 s each after 9 s of compiling"


@pytest.mark.parametrize(
    "changes, name, expected",
    [
        (
            {"local_devices": 3},
            "devices",
            "w-2 (process 2): its devices number 3, those of w-0 (process 0) 4",
        ),
        ({"devices": 12}, "devices", "w-2 (process 2): its devices in all hosts number 12"),
        (
            {"kind": "TPU v4"},
            "devices",
            "w-2 (process 2): its devices are TPU v4, those of w-0 (process 0) TPU v5p",
        ),
        (
            {"versions": {"jax": "0.10.2", "flax": "0.12.1"}},
            "packages",
            "flax differs: 0.12.1 on w-2 (process 2), 0.12.0 on w-0 (process 0)",
        ),
        ({"versions": {"jax": "0.10.2"}}, "packages", "flax differs: missing on w-2"),
        ({"config": "abd"}, "config", "config differs: abd on w-2 (process 2), abc on w-0 (process 0)"),
        (
            {"storage": {"error": "cannot write to gs://b: 403", "seconds": 0.1, "clock": None}},
            "workdir",
            "w-2 (process 2): cannot write to gs://b: 403",
        ),
        ({"clock": -7.5}, "clocks", "w-2 (process 2) is 7.5 s behind w-0 (process 0)"),
        (
            {"storage": {"error": "", "seconds": 0.1, "clock": 90.0}},
            "clocks",
            "w-2 (process 2) is 90.0 s ahead of the clock of the workdir's store",
        ),
        (
            {"sum_error": "the sum is 1 where one device gives 2"},
            "all-reduce",
            "w-2 (process 2): the sum is 1",
        ),
        ({"steps": {"error": "no such file"}}, "steps", "w-2 (process 2): no such file"),
        ({"steps": fact(0)["steps"] | {"losses": [1.5, 1.25, 1.125]}}, "steps", "losses differ"),
    ],
)
def test_one_fault_of_one_host(changes, name, expected):
    facts = hosts(**changes)
    check = words(facts, name)
    assert check.passed is False and check.words.startswith(expected)
    checks = judge(facts)
    assert [one.name for one in checks if one.passed is False] == [name] and not healthy(checks)


def test_another_slice_than_expected():
    check = words(hosts(), "devices", chips=32)
    assert check.passed is False and check.words.endswith("16 chips, not 32")
    # Two devices of a chip are one chip.
    assert words([fact(0, devices=4, devices_per_chip=2)], "devices", chips=2).passed


def test_what_is_not_checked_is_no_fault():
    checks = judge([fact(0, devices=4, storage=None)])
    found = {check.name: check.passed for check in checks}
    assert found["workdir"] is None and found["clocks"] is None and healthy(checks)


def test_a_tpu_without_its_kernels_is_noted():
    steps = fact(0)["steps"] | {"attention": "21x21 tokens: xla; 16x16 tokens: xla"}
    check = words([fact(0, steps=steps)], "attention")
    assert check.passed and "no kernel of the TPU" in check.words
    assert "no kernel" not in words([fact(0, kind="cpu", steps=steps)], "attention").words
