"""How far two judges agree: Cohen's kappa (1960) over marks of the same questions."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def agreement(marks: Iterable[tuple[int, int]]) -> dict[str, Any] | None:
    """Agreement of two judges who marked the same questions 0 or 1.

    Returns:
      `n` questions, `observed` share of equal marks, `expected` share by chance, and `kappa`, (observed - expected) /
      (1 - expected): 1 for equal judges, 0 for independent ones. It is None where both always give the same mark, of
      which chance would do as much. None without questions.
    """
    table = np.zeros((2, 2))
    for one, other in marks:
        table[one, other] += 1
    n = table.sum()
    if not n:
        return None
    observed = float(np.trace(table) / n)
    expected = float(table.sum(0) @ table.sum(1) / n**2)
    kappa = None if expected == 1 else (observed - expected) / (1 - expected)
    return {"n": int(n), "observed": observed, "expected": expected, "kappa": kappa}
