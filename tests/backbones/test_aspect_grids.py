"""Every family on the grids of all aspect buckets, with parameters that were made for the square."""

import jax
import pytest

from scaling_dit import backbones
from scaling_dit.backbones import contract
from scaling_dit.data.buckets import bucket_sizes
from tests.support.layouts import FIELDS

SIDE, TEXT = 16, (6, 16)
FAMILIES = [name if name == "uvit" else pytest.param(name, marks=pytest.mark.slow) for name in FIELDS]


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_the_square_fit_every_bucket(name):
    # Of one block: all are alike, and tracing takes the time.
    fields = FIELDS[name] | ({"depth": 1} if "depth" in FIELDS[name] else {})
    backbone = backbones.create(name, in_channels=4, text_dim=TEXT[1], **fields)
    square = contract.example_inputs(backbone, (SIDE, SIDE, 4), TEXT)
    variables = contract.abstract_variables(backbone, square)
    for size in bucket_sizes(SIDE, "config.buckets"):
        inputs = contract.example_inputs(backbone, (*size, 4), TEXT)
        found = jax.eval_shape(backbone.apply, variables, *inputs)
        contract.check_output(backbone, found, inputs[0].shape)
