"""An object store on a local folder, for tests: objects appear when they are closed, and nothing else can be done.

As with gs:// there is no renaming, no appending, and no folder that would have to be made. It stands behind the
`s3://` of etils.epath, so code under test meets it as any remote path.
"""

import io
import os
import pathlib

from etils.epath import backend, gpath

from scaling_dit import files

PREFIX = "s3://"


class _Upload(io.BytesIO):
    """What is written becomes an object on closing, whole; not if an error ended the block."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()

    def close(self):
        if not self.closed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(self.getvalue())
        super().close()


class ObjectStore(backend._OsPathBackend):
    """Objects of `s3://BUCKET/NAME` as files of a folder; `refused` lists what was asked for and cannot be done."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.refused = folder, []

    def local(self, path):
        return self.folder / os.fspath(path).removeprefix(PREFIX)

    def open(self, path, mode):
        if mode.startswith("a"):
            self._refuse("append", path)
        if mode.startswith("w"):
            upload = _Upload(self.local(path))
            return upload if "b" in mode else io.TextIOWrapper(upload, encoding="utf-8")
        return super().open(self.local(path), mode)

    def exists(self, path):
        return super().exists(self.local(path))

    def isdir(self, path):
        return super().isdir(self.local(path))

    def listdir(self, path):
        return super().listdir(self.local(path))

    def glob(self, path):
        found = super().glob(str(self.local(path)))
        return [PREFIX + pathlib.Path(name).relative_to(self.folder).as_posix() for name in found]

    def makedirs(self, path, *, exist_ok=False, mode=None):
        pass

    def mkdir(self, path, *, exist_ok=False, mode=None):
        pass

    def remove(self, path):
        super().remove(self.local(path))

    def stat(self, path):
        return super().stat(self.local(path))

    def rename(self, path, dst):
        self._refuse("rename", path)

    def replace(self, path, dst):
        self._refuse("replace", path)

    def copy(self, path, dst, overwrite):
        self._refuse("copy", path)

    def _refuse(self, what, path):
        self.refused.append((what, os.fspath(path)))
        raise NotImplementedError(f"an object store cannot {what}: {path}")


def install(monkeypatch, folder):
    """Puts a store behind `s3://` for one test and returns it."""
    store = ObjectStore(folder)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "s3", store)
    monkeypatch.setitem(files._SCHEMES, "s3", ("etils", ""))
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    return store
