"""The base of a run that trains adapters: the parameters of another run, which stay as they are.

The run keeps where its base lies, which checkpoint and average of it, and a hash of the parameters in `base.json`; its
checkpoints hold the hash too. The parameters are read from there at each start, straight into their shardings, and
refused if they are not those that the adapters were trained beside.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from etils import epath

from scaling_dit import config as config_lib
from scaling_dit import files, trees
from scaling_dit.checkpoints.checksums import params_hash
from scaling_dit.checkpoints.ema import find_ema, kept_emas
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.checkpoints.workdir import Workdir, read_saved
from scaling_dit.errors import UserError
from scaling_dit.parallel import rules
from scaling_dit.trees import Params

# In the `extra` of a checkpoint.
SHA256 = "base_sha256"


@dataclasses.dataclass(frozen=True)
class FrozenBase:
    """Where the base of a run lies.

    Attributes:
      place: the workdir of the base, absolute.
      step: of its checkpoint.
      ema: the average that is the base, a key of `TrainState.emas`; None for the raw weights.
      sha256: see `params_hash`; "" before they are read for the first time.
    """

    place: str
    step: int
    ema: str | None
    sha256: str = ""

    @classmethod
    def find(cls, place: str, step: int | None = None, ema: float | str | None = None) -> Self:
        """A checkpoint of a run, the newest by default, and one of its averages, by default the raw weights.

        Raises:
          UserError: no run there, one that trains adapters itself, no such checkpoint, or an average that is not kept.
        """
        if not Workdir(place).config.exists():
            raise UserError(
                f"--from={place} is no run's folder, and adapters are trained beside a run's parameters; `import` a "
                "file first"
            )
        saved, known = read_saved(place), config_lib.defaults()
        for section in ("optim", "adapter"):
            for name, value in saved.get(section, {}).items():
                if name in known[section]:
                    known[section][name] = value
        if known.adapter.rank:
            raise UserError(
                f"--from={place} trains adapters itself; give the run that is its base, or export it, which adds its "
                "adapters to the base, and import that"
            )
        name = find_ema(known, ema)
        if name is not None and name not in kept_emas(known):
            raise UserError(f"--from={place} keeps no EMA {name}; it keeps {', '.join(kept_emas(known))}")
        with Checkpoints(Workdir(place).checkpoints, read_only=True) as store:
            steps = store.all_steps()
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"--from={place} has no checkpoint{'' if step is None else f' of step {step}'}; there are: {steps}"
            )
        return cls(absolute(place), steps[-1] if step is None else step, name)

    @classmethod
    def read(cls, path: epath.Path) -> Self:
        """What `save` wrote.

        Raises:
          UserError: a damaged file, or none.
        """
        if not path.exists():
            raise UserError(
                f"{path} is missing, which says where the base of the adapters lies; put it back, or give the "
                "`train` command with --from"
            )
        saved = files.read_json(path, dict, "put it back, or give the `train` command with --from")
        try:
            return cls(**saved)
        except TypeError:
            raise UserError(f"{path} is damaged: it must hold place, step, ema and sha256") from None

    def save(self, path: epath.Path) -> None:
        """Writes it to a file, whole or not at all."""
        files.write_whole(path, (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @property
    def workdir(self) -> Workdir:
        """The folder of the base."""
        return Workdir(self.place)

    def load(self, mesh: jax.sharding.Mesh, boxed: Params) -> tuple[Params, dict[str, Any], Self]:
        """The parameters in their shardings and dtypes, the `extra` of their checkpoint, and this with their hash.

        Args:
          mesh: to lie on.
          boxed: the parameters of the run's model, abstract and with logical axes.

        Raises:
          UserError: no such checkpoint, parameters of another model, or others than those of `sha256`.
        """
        target = rules.with_shardings(trees.unbox(boxed), rules.param_shardings(mesh, boxed))
        stored = target
        if self.ema is not None:
            # Averages are float32 whatever `backbone.param_dtype` is.
            stored = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), target
            )
        with Checkpoints(self.workdir.checkpoints, read_only=True) as store:
            params, extra = store.restore_params(self.step, stored, ema=self.ema)
        found = dataclasses.replace(self, sha256=params_hash(_flat(params)))
        if self.sha256 and found.sha256 != self.sha256:
            raise UserError(
                f"the adapters were trained beside another base than the one in {self.place} (sha256 "
                f"{self.sha256[:12]}, step {self.step} there {found.sha256[:12]}); give the right one by --from, or "
                "start a new run"
            )
        return jax.tree.map(lambda x, want: x.astype(want.dtype), params, target), extra, found


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in trees.by_path(params).items()}


def check_base(now: FrozenBase, saved: Mapping[str, Any], where: str) -> None:
    """Makes sure that adapters are used beside the base they were trained beside.

    Args:
      now: the base at hand, loaded.
      saved: the `extra` of the adapters' checkpoint.
      where: the folder that the error names.

    Raises:
      UserError: another one.
    """
    then = saved.get(SHA256, "")
    if then != now.sha256:
        raise UserError(
            f"the adapters in {where} were trained beside another base (sha256 {then[:12] or 'of none'}, in "
            f"{now.place} {now.sha256[:12]}); give the right one by --from, or start a new run"
        )


def absolute(place: str) -> str:
    """A place that another start finds again from any folder; ~ and variables are expanded."""
    expanded = files.expand(place)
    return expanded if files.is_remote(epath.Path(expanded)) else os.path.abspath(expanded)
