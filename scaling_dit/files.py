"""Writing files, local or remote, so that no reader ever sees half of one."""

from etils import epath


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes a file so that no reader ever sees half of it; remote stores do so by themselves and cannot rename."""
    if "://" in str(path):
        path.write_bytes(data)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
