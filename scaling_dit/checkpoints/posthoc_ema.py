"""Any average of a run's parameters, rebuilt afterwards from snapshots of two that were kept (arXiv 2312.02696, 3.1).

While a run trains, averages with power-function profiles (`ema.update_power_emas`) are stored every
`checkpoint.ema_every` steps. Afterwards a wanted average is the combination of these snapshots, and of the parameters
themselves, that comes nearest to it.

Every average of the parameters p_0, ..., p_T, whatever its weights, is p_T less a share of each update:

    average = p_T - sum over j = 1..T of missing_j (p_j - p_{j-1})

where missing_j is the weight of the parameters before update j. So shares, not weights, are fitted: the error of the
combination is then the same sum over the differences of shares, and least squares are right where updates are about
independent of one another (the paper fits the weights, which is right where parameters are). Shares are exact, step
by step, in float64; no integral replaces a sum. A step whose update was skipped for a non-finite loss counts as one
at which the parameters stay: so it does for power averages, while those by decay stand still at it.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from scaling_dit.checkpoints.ema import POWER, power_exponent, power_names, warm_limit
from scaling_dit.checkpoints.state import TrainState
from scaling_dit.checkpoints.store import Checkpoints
from scaling_dit.errors import UserError
from scaling_dit.trees import Params

# Above it, an average is refused; see `Fit.residual`.
LARGEST_RESIDUAL = 0.2
_KEEP_ALL = 2**31 - 1
# Steps that a fit takes at a time.
_CHUNK = 2**14
# Snapshots that a fit takes at most: its time grows with their square.
_MOST = 200
# Smaller coefficients are left out.
_LEAST = 1e-6
# Smaller singular values are left out: their combinations would only add up rounding errors.
_RCOND = 1e-7


class Snapshots:
    """The snapshots of a run's power averages, as a context; nothing is written if the run keeps none.

    All processes call every method, in the same order. A snapshot is of one moment and never changes. One that is
    newer than the state from which a run resumes is removed, for the run may take another way.

    Args:
      directory: folder of the snapshots; made if there are any.
      config: of the run.
    """

    def __init__(self, directory: epath.PathLike, config: ConfigDict) -> None:
        self._every = config.checkpoint.ema_every if config.optim.ema_power else 0
        self._names = power_names(config)
        self._store = (
            Checkpoints(directory, keep_last=_KEEP_ALL, patience=config.checkpoint.retry)
            if self._every
            else None
        )

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()

    def back_to(self, step: int) -> None:
        """Removes the snapshots after a step: that of the state from which the run resumes."""
        if self._store is not None:
            for newer in [saved for saved in self._store.all_steps() if saved > step]:
                self._store.remove(newer)

    def save(self, step: int, state: TrainState) -> None:
        """Stores the power averages if this step is one of `checkpoint.ema_every`; returns once they are copied.

        A step that is stored already is left as it is. The loop calls this at the start of every step, so that a
        resumed run stores what a kill cut short; the averages of the last step are in its checkpoint.
        """
        if self._store is not None and step and step % self._every == 0:
            self._store.save(step, {"emas": {name: state.emas[name] for name in self._names}})

    def wait(self) -> None:
        """Blocks until all are on disk: before a checkpoint is saved, for a run resumes after that step."""
        if self._store is not None:
            self._store.wait()


@dataclasses.dataclass(frozen=True)
class Fit:
    """The combination of averages that approximates another.

    average ~ parameters + sum over i of coefficients[i] (average i - parameters)

    Attributes:
      coefficients: float64 [N].
      residual: length of the error of the missing shares over the length of the shares themselves: the expected
        distance to the true average over the distance between that and the parameters.
    """

    coefficients: np.ndarray
    residual: float


def missing_shares(name: str, saved: int, first: int, last: int) -> np.ndarray:
    """Share of updates `first` to `last`, counted from 1, that an average after step `saved` lacks: float64 [N].

    It is the weight of the parameters before the update, and 1 for updates after `saved`.

    Args:
      name: key of the average, "power-0.05" or "0.999".
    """
    updates = np.arange(first, last + 1, dtype=np.float64)
    if name.startswith(POWER):
        exponent = power_exponent(float(name.removeprefix(POWER)))
        # The product of (1 - 1/k)^exponent over k = j..saved.
        return np.minimum((updates - 1) / saved, 1.0) ** exponent
    steps = np.arange(first - 1, saved, dtype=np.float64)
    logs = np.log(np.minimum(float(name), warm_limit(steps)))
    # The sum of `logs` from update first, first + 1, ..., saved on, and of none.
    after = np.append(np.cumsum(logs[::-1])[::-1], 0.0)
    return np.exp(after[np.clip(updates - first, 0, len(steps)).astype(int)])


def fit(wanted: str, step: int, basis: Sequence[tuple[str, int]]) -> Fit:
    """The combination of averages `basis`, (name, step saved) each, nearest to the average `wanted` after `step`.

    Least squares over all steps. Long runs go through a QR factorisation by chunks of steps, so memory does not
    grow with them.
    """
    columns = len(basis) + 1
    triangle: Any = np.zeros((0, columns))
    for first in range(1, step + 1, _CHUNK):
        last = min(first + _CHUNK - 1, step)
        shares = [missing_shares(name, saved, first, last) for name, saved in [*basis, (wanted, step)]]
        triangle = np.linalg.qr(np.concatenate([triangle, np.stack(shares, axis=1)]), mode="r")
    known, target = triangle[:, :-1], triangle[:, -1]
    coefficients = np.linalg.lstsq(known, target, rcond=_RCOND)[0]
    # Before the first update there are no shares: every average is the parameters themselves.
    residual = np.linalg.norm(known @ coefficients - target) / (np.linalg.norm(target) or 1.0)
    return Fit(coefficients, float(residual))


def thinned(steps: Sequence[int], most: int = _MOST) -> list[int]:
    """At most `most` of the ascending `steps`: densest at the end, where averages weigh them most."""
    if len(steps) <= most:
        return list(steps)
    back = np.unique(np.geomspace(1, len(steps), most).round().astype(int))
    return [steps[-number] for number in back[::-1]]


def rebuild(
    directory: epath.PathLike,
    store: Checkpoints,
    step: int,
    params: Params,
    wanted: str,
    tracks: Sequence[str],
) -> Params:
    """An average of a run after `step`, from its snapshots up to there and the checkpoint of `step`.

    Args:
      directory: folder of the run's `Snapshots`.
      store: the run's checkpoints.
      params: the parameters of that checkpoint; the average has their shapes and shardings, and is float32.
      wanted: "0.97" or "power-0.08".
      tracks: the names of the power averages that the run keeps.

    Raises:
      UserError: the snapshots do not determine that average.
    """
    with Checkpoints(directory, read_only=True) as snapshots:
        saved = thinned([at for at in snapshots.all_steps() if at < step])
        places = [(name, at) for at in [*saved, step] for name in tracks]
        found = fit(wanted, step, places)
        fitted = (
            f"EMA {wanted} from {len(saved) + 1} snapshots of {', '.join(tracks)} up to step {step}: "
            f"off by {found.residual:.2%} of its distance to the raw weights"
        )
        if found.residual > LARGEST_RESIDUAL:
            raise UserError(
                f"cannot rebuild {fitted}, more than {LARGEST_RESIDUAL:.0%}; ask for a longer average, or train with a "
                "smaller config.checkpoint.ema_every"
            )
        if jax.process_index() == 0:
            print(f"scaling-dit: rebuilt {fitted}", file=sys.stderr)
        average = params
        add = jax.jit(_add, out_shardings=jax.tree.map(lambda p: p.sharding, params))
        for (name, at), coefficient in zip(places, found.coefficients, strict=True):
            # Each one used costs a read.
            if abs(coefficient) > _LEAST:
                source = store if at == step else snapshots
                average = add(average, source.restore_params(at, params, ema=name)[0], params, coefficient)
    return average


def _add(total: Params, average: Params, params: Params, coefficient: float) -> Params:
    # Differences, which are small where the coefficients are large.
    return jax.tree.map(lambda t, a, p: t + coefficient * (a - p), total, average, params)
