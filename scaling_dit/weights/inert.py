"""Entries of published files that only training used: they are passed over and named once; others must fit a table."""

import functools
import re
import sys
from collections.abc import Iterable, Sequence

from scaling_dit.errors import printable

# Counters and constants that modules of torch and transformers save beside their weights.
_ANYWHERE = re.compile(r"(?:^|\.)(?:num_batches_tracked|position_ids)$")
# Of an autoencoder's training: its losses (LPIPS and the discriminator in them), the discriminator by itself, and the
# average of its weights that the latent-diffusion code keeps beside them.
AUTOENCODER = ("loss.", "discriminator.", "model_ema.")
# What diffusers' EMAModel adds to the `config.json` of the folder that it saves.
EMA_SETTINGS = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
# Names of one kind that are written out in a report.
_SHOWN = 3


def inert(names: Iterable[str], prefixes: Sequence[str] = ()) -> list[str]:
    """Those of the names that nothing reads after training, sorted.

    Args:
      names: of the entries that no row of a table reads.
      prefixes: of further ones, such as AUTOENCODER.
    """
    return sorted(name for name in names if _ANYWHERE.search(name) or name.startswith(tuple(prefixes)))


@functools.cache
def report(names: tuple[str, ...], what: str) -> None:
    """Says once which entries were ignored, as `loss.* (42 entries)` where there are many of a kind."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    shown = [
        ", ".join(group) if len(group) <= _SHOWN else f"{head}.* ({len(group)} entries)"
        for head, group in groups.items()
    ]
    print(
        f"scaling-dit: {what}: ignored {printable(', '.join(shown))}, which only training used",
        file=sys.stderr,
    )
