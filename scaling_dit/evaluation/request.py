"""What `evaluate` is asked for, and the config that follows from it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from scaling_dit import config as config_lib
from scaling_dit.checkpoints.workdir import Workdir, read_config
from scaling_dit.config import metrics as metrics_config
from scaling_dit.errors import UserError
from scaling_dit.evaluation.registry import METRICS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What `evaluate` is asked for.

    Attributes:
      workdir: of the run; "" scores given images without one.
      out: folder to write to; by default `evaluation/` in the workdir, or in the folder of given images.
      metrics: their names; the run's by default.
      items: prompts of each metric; by default 500 of held-out data, and all of a published set.
      seed: generation seeds.
      guidance: scales of guidance; the run's by default.
      step, ema, changes: as in `pipeline.open_for_sampling`.
      store: how images are kept; see `sampling.shards`.
      images: folder of images to score in place of sampling.
      reference: statistics of real images, or a source to build them of, for the metrics that compare with them.
      overrides: `--config.metrics.NAME.FIELD=VALUE` arguments.
      shared: fields of every metric that has them, such as the judge.
      own_code: as in `workdir.read_config`.
      apart: whether every setting has a folder of its own in `out`, though it is the only one.
    """

    workdir: str = ""
    out: str | None = None
    metrics: Sequence[str] | None = None
    items: int | None = None
    seed: Sequence[int] = (0,)
    guidance: Sequence[float] = ()
    step: int | None = None
    ema: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    store: str = ""
    images: str = ""
    reference: str = ""
    overrides: Sequence[str] = ()
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    apart: bool = False
    own_code: bool = False

    @property
    def root(self) -> epath.Path:
        """The folder that `results.jsonl` is in."""
        if self.out:
            return epath.Path(self.out)
        return Workdir(self.workdir).evaluation if self.workdir else epath.Path(self.images) / "evaluation"


def config_of(request: Request) -> ConfigDict:
    """The run's config with the metrics that are asked for; the defaults where there is no run.

    Raises:
      UserError: no run, no metrics, or overrides of other fields than those of metrics.
    """
    for override in request.overrides:
        if not override.startswith(("--config.metrics.", "--noconfig.metrics.")):
            raise UserError(
                f"{override}: evaluate takes fields of metrics only, --config.metrics.NAME.FIELD=VALUE"
            )
    if request.workdir:
        saved = read_config(request.workdir, own_code=request.own_code)
        names = tuple(request.metrics or saved.eval.metrics)
        where = f"the run in {request.workdir} names no metric in config.eval.metrics; give"
    elif request.images:
        saved, names = None, tuple(request.metrics or ())
        where = "images without a run need"
    else:
        raise UserError("evaluate needs --workdir, or --images; see scaling-dit evaluate --help")
    if not names:
        raise UserError(f"{where} --metrics={','.join(METRICS)}")
    if saved is not None and names == tuple(saved.eval.metrics) and not (request.shared or request.overrides):
        return saved
    named = [f"--config.eval.metrics={names!r}", *_shared(names, request.shared), *request.overrides]
    return config_lib.resolve(config_lib.defaults() if saved is None else saved, named)


def _shared(names: Sequence[str], fields: Mapping[str, Any]) -> list[str]:
    """Fields as overrides of every metric that has them.

    Raises:
      UserError: no metric has one of them.
    """
    found = []
    for field, value in fields.items():
        having = [section for section, known in metrics_config.sections(names).items() if field in known]
        if not having:
            raise UserError(
                f"none of the metrics {', '.join(names)} has a field {field!r}; leave out that flag"
            )
        # A text stands as it is.
        text = value if isinstance(value, str) else repr(value)
        found += [f"--config.metrics.{section}.{field}={text}" for section in having]
    return found
