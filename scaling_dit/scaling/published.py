"""Laws as papers printed them, to compare a study with, and what is wrong with one of them."""

import dataclasses

from scaling_dit.scaling.curves import Curve


@dataclasses.dataclass(frozen=True)
class Published:
    """A printed law.

    Attributes:
      source: where it stands. x: the variable and its unit. law: as printed. remark: what to know before using it.
    """

    source: str
    x: str
    law: Curve
    remark: str = ""


def _power(a: float, b: float) -> Curve:
    return Curve("power", {"a": a, "b": b}, 0, float("nan"))


_P1 = "arXiv 2404.02883, section 5"
# TIFA of P1's UNets. Exponents have one significant digit, so compare predicted scores and not coefficients.
P1_COMPUTE = Published(_P1, "training compute in GFLOPs, 2 FLOPs a multiply-accumulate", _power(0.47, 0.02))
P1_DATA = Published(_P1, "image-noun pairs in millions, SD2's UNet", _power(0.64, 0.03))
P1_PARAMS = Published(
    _P1,
    "parameters in millions, after 600,000 steps",
    _power(0.77, 0.11),
    "The exponent cannot be right: TIFA is at most 1, and the law gives 1.81 for the 2,392M parameters of SDXL's UNet, "
    "which scores 0.84. With the exponent 0.011 it gives 0.839 there, and 0.823 to 0.844 over the sizes that were "
    "trained, which is the range of the figure.",
)
# The exponent that agrees with the printed figure.
P1_PARAMS_CORRECTED = dataclasses.replace(
    P1_PARAMS, law=_power(0.77, 0.011), remark="Corrected; see P1_PARAMS."
)
