"""The work of a run's steps: MFU, FLOP/s and tokens from a rate of steps, and the memory of devices.

MFU counts model FLOPs, 6 x multiply-accumulates of the backbone x images, without rematerialisation, frozen encoders
and padding, over the stated peak of bfloat16 products. What is not known is left out, never guessed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one step, over all chips.

    Attributes:
      flops: model FLOPs; None if they cannot be counted.
      tokens: tokens of images that the backbone reads; None if it cuts no patches.
      chips: accelerators; None if the kind of device is not known, as for CPUs.
      peak: FLOP/s of bfloat16 products on one chip; None likewise.
    """

    flops: int | None = None
    tokens: int | None = None
    chips: int | None = None
    peak: float | None = None

    def scalars(self, steps_per_second: float) -> dict[str, float]:
        """Metrics at a rate of steps; empty at a rate of 0, which means that none is known."""
        found: dict[str, float] = {}
        if not steps_per_second:
            return found
        if self.tokens is not None:
            found["speed/tokens_per_s"] = self.tokens * steps_per_second
        if self.flops is not None and self.chips:
            rate = self.flops * steps_per_second / self.chips
            found["speed/model_tflops_per_chip"] = rate / 1e12
            if self.peak:
                found["speed/mfu"] = rate / self.peak
        return found

    def __str__(self) -> str:
        if self.flops is None or not self.chips or not self.peak:
            return "not known for these devices"
        peak, flops = self.peak / 1e12, self.flops / 1e12
        return f"of {self.chips} x {peak:,.0f} TFLOP/s (bfloat16); a step has {flops:,.2f} TFLOP"


def image_tokens(backbone: Any, latents: tuple[int, int, int], batch: int) -> int | None:
    """Tokens that a backbone cuts a batch of latents (H, W, C) into; None for a backbone without patches."""
    patch = getattr(backbone, "patch", None)
    if not isinstance(patch, int) or patch < 1:
        return None
    height, width, _ = latents
    return batch * (height // patch) * (width // patch)


def device_memory(devices: Sequence[Any]) -> dict[int, tuple[int, int]]:
    """Device id -> bytes in use now, and at most since the process began. Devices that do not say are left out."""
    found = {}
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_in_use" in stats and "peak_bytes_in_use" in stats:
            found[device.id] = int(stats["bytes_in_use"]), int(stats["peak_bytes_in_use"])
    return found


def memory_scalars(memory: Mapping[int, tuple[int, int]]) -> dict[str, float]:
    """Metrics in GiB, for each device."""
    return {
        f"memory/{name}_gib_{device}": value / GIB
        for device, values in sorted(memory.items())
        for name, value in zip(("in_use", "peak"), values, strict=True)
    }
