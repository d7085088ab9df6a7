"""A family added as docs/extending.md says: three files, and it is created, counted, trained and exported."""

import pytest
from safetensors.numpy import load_file

from tests.support import extending

COUNT = """
import scaling_dit
backbone = scaling_dit.create("convnet", size="w128-d8", text_dim=32)
print(scaling_dit.__file__, scaling_dit.count(backbone, latents=(8, 8, 4), text=(5, 32)).params)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return extending.carry_out("A family of backbones", tmp_path_factory.mktemp("copy"), lambda _: COUNT)


def test_the_page_adds_a_family(copy):
    assert copy.touched == {
        "scaling_dit/backbones/convnet.py",
        "scaling_dit/backbones/convnet_weights.py",
        "scaling_dit/backbones/__init__.py",
        "docs/config.md",
    }
    width, depth = 128, 8
    conv = 9 * width * width + width
    expected = 32 * width + width + depth * (conv + width * width + width) + 2 * 9 * 4 * width + width + 4
    assert copy.code == 0, copy.printed
    place, params = copy.printed.split()
    assert place == str(copy.folder / "scaling_dit/__init__.py") and int(params) == expected


@pytest.mark.slow
def test_the_commands_of_the_page_train_and_export_it(copy, tmp_path):
    train, export = copy.commands
    commands = (extending.typed([train], tmp_path, *extending.TINY), extending.typed([export], tmp_path))
    copy.python("\n".join(commands))
    weights = load_file(tmp_path / "exports/convnet/model.safetensors")
    assert weights["conv_in.weight"].shape == (32, 3, 3, 3) and "blocks.1.shift.bias" in weights
