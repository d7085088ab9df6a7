"""Points that laws are fitted to: arrays of equal length, checked."""

from collections.abc import Sequence

import numpy as np

from scaling_dit.errors import UserError

Interval = tuple[float, float]
Values = Sequence[float] | np.ndarray
# The run of each point; points of one run are resampled together. None: each point is a run of its own.
Runs = Sequence[object] | np.ndarray | None


def positive(**arrays: Values) -> list[np.ndarray]:
    """The arrays as float64 [N].

    Raises:
      UserError: they have different lengths, or hold something that is no positive finite number.
    """
    made = {name: numbers(name, values) for name, values in arrays.items()}
    lengths = {name: len(values) for name, values in made.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"the points differ in number: {lengths}; give one value of each for every point")
    for name, values in made.items():
        wrong = ~(np.isfinite(values) & (values > 0))
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise UserError(f"{name}[{first}] is {values[first]}; a law needs positive finite numbers")
    return list(made.values())


def numbers(name: str, values: Values) -> np.ndarray:
    """Values as float64 [N].

    Raises:
      UserError: they are no numbers.
    """
    try:
        return np.asarray(values, float).ravel()
    except (TypeError, ValueError):
        raise UserError(f"{name} must be numbers, one for each point") from None
