"""Runs that train low-rank adapters (`model/adapters.py`): where the frozen base of a start comes from."""

import dataclasses

import jax
from ml_collections import ConfigDict

from scaling_dit.checkpoints.frozen_base import FrozenBase, absolute
from scaling_dit.checkpoints.workdir import Workdir, check_tokenizer
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
        name then says where that folder lies now.

    Raises:
      UserError: adapters without a base, or no such run, checkpoint or average at `start`.
    """
    if not config.adapter.rank:
        return None
    if workdir.config.exists() or (workdir.base.exists() and workdir.checkpoints.exists()):
        kept = FrozenBase.read(workdir.base)
        return kept if start is None else dataclasses.replace(kept, place=absolute(start.place))
    if start is None:
        raise UserError(
            f"config.adapter.rank is {config.adapter.rank}, so the run trains adapters beside a base; name the run "
            "that is the base by --from=WORKDIR, or set config.adapter.rank=0"
        )
    return FrozenBase.find(start.place, start.step, start.ema)


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
