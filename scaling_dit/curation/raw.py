"""Opens the raw source that a curation verb names by `--source=NAME` and `--config.source.FIELD=VALUE`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from scaling_dit import config as config_lib
from scaling_dit.config import override_key
from scaling_dit.data.sources import create_raw_source
from scaling_dit.data.sources.image_files import ImageFileSource
from scaling_dit.errors import UserError

# Fields without effect when all files are read as they are.
_OWN = ("held_out_fraction", "max_damaged", "image_size")


class RawName(NamedTuple):
    """The name and fields that open a raw source on any machine; hashable."""

    name: str
    fields: tuple[tuple[str, Any], ...] = ()


def raw_name(name: str, overrides: Sequence[str] = ()) -> RawName:
    """The source `name` with the fields that `--config.source.FIELD=VALUE` arguments set.

    Raises:
      UserError: an override of another section, or of a field that this source does not have.
    """
    for override in overrides:
        if not override.lstrip("-").startswith(("config.source.", "noconfig.source.")):
            raise UserError(f"{override}: with --source only --config.source.FIELD=VALUE can be set")
    if not overrides:
        return RawName(name)
    config = config_lib.defaults()
    config.source.name = name
    resolved = config_lib.resolve(config, overrides).source.to_dict()
    given = {override_key(override).partition(".")[2] for override in overrides}
    for field in sorted(given.intersection((*_OWN, "name"))):
        raise UserError(f"--config.source.{field} has no meaning here: all files are read, as they are")
    return RawName(name, tuple(sorted((field, resolved[field]) for field in given)))


@functools.cache
def open_raw(raw: RawName) -> ImageFileSource:
    """The source, opened once per process. Raises UserError as `create_raw_source` does."""
    return create_raw_source(raw.name, **dict(raw.fields))
