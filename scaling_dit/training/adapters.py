"""Runs that train low-rank adapters (`model/adapters.py`): where the frozen base of a start comes from."""

import dataclasses

import jax
from ml_collections import ConfigDict

from scaling_dit.checkpoints.frozen_base import SHA256, FrozenBase, absolute
from scaling_dit.checkpoints.workdir import Workdir, check_tokenizer, newest_extra
from scaling_dit.errors import UserError
from scaling_dit.model.frozen import check_frozen
from scaling_dit.training.base import Start
from scaling_dit.trees import Params


def base_of(config: ConfigDict, workdir: Workdir, start: Start | None) -> FrozenBase | None:
    """The base of a run, not yet read; None for a run that trains its parameters themselves.

    Args:
      config: of the run, resolved.
      workdir: of the run, new or its own.
      start: the run that the user named as its base. A run that has one already keeps its checkpoint and average; the
        name then says where that folder lies now. Where `base.json` is lost or damaged, it is found by the name again.

    Raises:
      UserError: adapters without a base; no such run, checkpoint or average at `start`, or another than the run has.
    """
    if not config.adapter.rank:
        return None
    if workdir.config.exists() or (workdir.base.exists() and workdir.checkpoints.exists()):
        try:
            kept = FrozenBase.read(workdir.base)
        except UserError:
            # The start is the way out that it names.
            if start is None:
                raise
        else:
            return kept if start is None else _moved(kept, start, workdir)
    if start is None:
        raise UserError(
            f"config.adapter.rank is {config.adapter.rank}, so the run trains adapters beside a base; name the run "
            "that is the base by --from=WORKDIR, or set config.adapter.rank=0"
        )
    found = FrozenBase.find(start.place, start.step, start.ema)
    return dataclasses.replace(found, sha256=_trained_beside(workdir))


def _moved(kept: FrozenBase, start: Start, workdir: Workdir) -> FrozenBase:
    """The base of a run in the place that a start names.

    Raises:
      UserError: the start asks for another checkpoint or average.
    """
    same = start.step in (None, kept.step)
    if same and start.ema is not None:
        same = FrozenBase.find(start.place, kept.step, start.ema).ema == kept.ema
    if not same:
        asked = str(start) if start.ema is None else f"{start} with --from_ema={start.ema}"
        raise UserError(
            f"the adapters in {workdir} are trained beside step {kept.step} of their base, "
            f"{f'EMA {kept.ema}' if kept.ema else 'raw weights'}, not {asked}; "
            "leave @STEP and --from_ema out, or give another --workdir"
        )
    return dataclasses.replace(kept, place=absolute(start.place))


def _trained_beside(workdir: Workdir) -> str:
    """The hash of the base that the run's newest checkpoint was trained beside; "" for a run without checkpoints."""
    return str((newest_extra(workdir) or {}).get(SHA256, ""))


def read_base(
    base: FrozenBase, mesh: jax.sharding.Mesh, boxed: Params, frozen_hash: str, tokenizer_hash: str
) -> tuple[Params, FrozenBase]:
    """The parameters of a base in their shardings, and the base with their hash.

    Args:
      base: of `base_of`.
      mesh: of the run.
      boxed: the parameters of the run's model, abstract and with logical axes.
      frozen_hash: of the run's frozen weights, which must be the base's.
      tokenizer_hash: of its tokenizer, likewise.

    Raises:
      UserError: no such checkpoint, the parameters of another model, other frozen weights or another tokenizer than
        the base was trained with, or another base than the run has had.
    """
    params, extra, found = base.load(mesh, boxed)
    where = str(base.workdir.checkpoints)
    check_frozen(frozen_hash, extra, where)
    check_tokenizer(tokenizer_hash, extra, where)
    return params, found
