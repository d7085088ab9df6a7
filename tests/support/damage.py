"""Damage to files of a checkpoint."""

from etils import epath


def flip(path: epath.Path, bit: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def flip_of_data(checkpoint: epath.Path) -> None:
    """Changes one bit in the middle of the largest file: of the arrays."""
    path = max((p for p in (checkpoint / "state").glob("*/d/*")), key=lambda p: p.stat().length)
    flip(path, path.stat().length * 4)
