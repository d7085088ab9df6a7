"""What conditions cost by `count`: tokens lengthen every block, channels widen the first layer alone."""

import pytest

from scaling_dit import backbones
from scaling_dit.costs.count import count
from tests.support.layouts import FIELDS

LATENTS, TEXT = (8, 8, 4), (5, 16)
# Time, text, and 4 x 4 image tokens.
TOKENS, IMAGE, HIDDEN = 1 + 5 + 16, 16, 32


def counted(name, *rows):
    return count(backbones.create(name, text_dim=16, conditions=rows, **FIELDS[name]), LATENTS, TEXT)


def test_tokens_lengthen_every_block_and_channels_widen_the_first_layer():
    plain = counted("uvit")
    channel = counted("uvit", ("a", 5, "channel", "shared"))
    token = counted("uvit", ("a", 5, "token", "shared"))
    # A patch of 2 x 2 x 5 numbers; tokens have a bias.
    assert channel.params - plain.params == 20 * HIDDEN
    assert token.params - plain.params == 21 * HIDDEN
    embedding = 20 * HIDDEN * IMAGE
    assert channel.macs_total - plain.macs_total == embedding
    assert token.modules["condition_embed"].macs_total == embedding
    for block in ("in_blocks", "mid_block", "out_blocks"):
        assert channel.modules[block] == plain.modules[block]
        # Linear layers by tokens, attention by their square.
        linear, before = token.modules[block].macs_paper, plain.modules[block].macs_paper
        assert linear * TOKENS == before * (TOKENS + IMAGE)
        products = plain.modules[block].macs_total - before
        found = token.modules[block].macs_total - linear
        assert found * TOKENS**2 == products * (TOKENS + IMAGE) ** 2
    assert token.activation_bytes > 1.3 * plain.activation_bytes > 1.2 * channel.activation_bytes


@pytest.mark.slow
def test_several_conditions_add_up_and_a_unet_reads_channels():
    one, two = ("a", 5, "token", "shared"), ("b", 4, "token", "shared")
    lengths = [counted("pixart", *rows).modules["blocks"].macs_paper for rows in ((), (one,), (one, two))]
    assert lengths[2] - lengths[1] == lengths[1] - lengths[0] > 0
    channel = counted("unet", ("a", 5, "channel", "shared"))
    assert channel.macs_total - counted("unet").macs_total == 9 * 5 * HIDDEN * 64
