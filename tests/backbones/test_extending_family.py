"""A family added as docs/extending.md says: three files, and it is created, counted, trained and exported."""

from safetensors.numpy import load_file

from tests.support import extending

HEADING = "A family of backbones"
COUNT = """
import scaling_dit
backbone = scaling_dit.create("convnet", size="w128-d8", text_dim=32)
print(scaling_dit.__file__, scaling_dit.count(backbone, latents=(8, 8, 4), text=(5, 32)).params)
"""


def test_the_page_adds_a_family(tmp_path):
    assert extending.apply(HEADING, tmp_path) == [
        "scaling_dit/backbones/convnet.py",
        "scaling_dit/backbones/convnet_weights.py",
        "scaling_dit/backbones/__init__.py",
    ]
    width, depth = 128, 8
    conv = 9 * width * width + width
    expected = 32 * width + width + depth * (conv + width * width + width) + 2 * 9 * 4 * width + width + 4
    place, params = extending.run(tmp_path, "-c", COUNT).split()
    assert place == str(tmp_path / "scaling_dit/__init__.py") and int(params) == expected
    for command in extending.commands(HEADING):
        extending.run(tmp_path, "-m", "scaling_dit", *command)
    weights = load_file(tmp_path / "exports/convnet/model.safetensors")
    assert weights["conv_in.weight"].shape == (32, 3, 3, 3) and "blocks.1.shift.bias" in weights
