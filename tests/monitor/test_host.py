"""The name of the CPU."""

import pathlib

from scaling_dit.monitor import host


def test_the_processor_is_that_of_the_kernel(monkeypatch):
    info = pathlib.Path("/proc/cpuinfo")
    found = host.processor()
    assert found and (not info.exists() or "model name" not in info.read_text() or found in info.read_text())
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: False)
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    assert host.processor() == "x86_64"
