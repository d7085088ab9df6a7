"""The model FLOPs of a step that trains adapters: what is saved are the gradients of kernels that nothing adapts."""

import json

import jax
import pytest

from scaling_dit import backbones, config
from scaling_dit.backbones import contract
from scaling_dit.cli import main as cli
from scaling_dit.costs.count import count
from scaling_dit.costs.step import frozen_macs
from scaling_dit.model.adapters import Adapters

LATENTS, TEXT = (8, 8, 4), (6, 16)


def adapters_of(backbone, *targets):
    inputs = contract.example_inputs(backbone, LATENTS, TEXT)
    boxed = {"backbone": jax.eval_shape(backbone.init, jax.random.key(0), *inputs)["params"]}
    settings = config.defaults()
    settings.adapter.rank = 2
    settings.adapter.targets = targets or settings.adapter.targets
    return Adapters.of(settings, boxed)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_only_adapted_kernels_have_gradients(scan_layers):
    backbone = backbones.create("uvit", size="h32-d4-n2", in_channels=4, text_dim=16, scan_layers=scan_layers)
    counted = count(backbone, LATENTS, TEXT)
    assert frozen_macs(counted, None) == 0
    assert frozen_macs(counted, adapters_of(backbone, "kernel$")) == 0
    tokens, hidden, blocks = 1 + 6 + 16, 32, 5
    # qkv and proj of every block.
    adapted = tokens * blocks * 4 * hidden**2
    assert counted.macs_paper - frozen_macs(counted, adapters_of(backbone)) == adapted


def test_count_shows_what_is_trained_and_fewer_flops(capsys):
    def counted(*overrides):
        assert cli.main(["count", "--config=experiments/shapes.py:smoke", "--json", *overrides]) == 0
        return json.loads(capsys.readouterr().out)

    plain, adapted = counted(), counted("--config.adapter.rank=2")
    assert "params_adapters" not in plain
    # 3 blocks of qkv [32, 3, 32] and proj [32, 32].
    assert adapted["params_adapters"] == 3 * (2 * 3 * 2 * 32 + 2 * 2 * 32)
    assert adapted["params"] == plain["params"]
    ratio = adapted["train_flops_total"] / plain["train_flops_total"]
    assert 2 / 3 < ratio < 0.9
