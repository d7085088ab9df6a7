"""MFU, FLOP/s and tokens from rates; memory where devices say it."""

import types

import pytest

from scaling_dit import backbones
from scaling_dit.monitor.work import GIB, Work, device_memory, image_tokens, memory_scalars


def test_mfu_is_flops_over_the_peak_of_all_chips():
    work = Work(flops=8 * 10**14, tokens=64 * 256, chips=4, peak=4e14)
    assert work.scalars(0.5) == {
        "speed/tokens_per_s": 64 * 256 / 2,
        "speed/model_tflops_per_chip": 100.0,
        "speed/mfu": 0.25,
    }
    assert "4 x 400 TFLOP/s" in str(work)


def test_what_is_not_known_is_left_out():
    assert Work().scalars(1.0) == {} and Work(flops=1, tokens=1, chips=1, peak=1.0).scalars(0.0) == {}
    assert Work(tokens=3).scalars(2.0) == {"speed/tokens_per_s": 6.0}
    assert Work(flops=10**12, chips=1).scalars(2.0) == {"speed/model_tflops_per_chip": 2.0}


def test_tokens_are_patches():
    assert image_tokens(backbones.create("uvit", patch=2), (32, 32, 4), 8) == 8 * 256
    assert image_tokens(backbones.create("unet"), (32, 32, 4), 8) is None


def device(number, stats):
    return types.SimpleNamespace(id=number, memory_stats=lambda: stats)


def test_memory_of_devices_that_say_it():
    devices = [
        device(0, {"bytes_in_use": GIB, "peak_bytes_in_use": 3 * GIB}),
        device(1, None),
        device(2, {"bytes_in_use": 5}),
        device(5, {"bytes_in_use": 0, "peak_bytes_in_use": GIB // 2, "bytes_limit": 1}),
    ]
    memory = device_memory(devices)
    assert memory == {0: (GIB, 3 * GIB), 5: (0, GIB // 2)}
    assert memory_scalars(memory) == {
        "memory/in_use_gib_0": 1.0,
        "memory/peak_gib_0": pytest.approx(3.0),
        "memory/in_use_gib_5": 0.0,
        "memory/peak_gib_5": 0.5,
    }
