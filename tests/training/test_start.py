"""What a start says of parts of a user's own whose source file has changed since the checkpoint."""

import pytest

from scaling_dit import config as config_lib
from scaling_dit.config.own_code import changes, source_hashes
from scaling_dit.training.start import notice_changed_code


@pytest.fixture
def config(tmp_path, monkeypatch):
    (tmp_path / "own_start.py").write_text(
        "import optax\n\n\ndef mine(b1=0.5):\n    return optax.scale_by_lion(b1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return config_lib.resolve(config_lib.defaults(), ["--config.optim.name=own_start:mine"])


def test_the_hash_is_of_the_file_as_it_is_now(config, tmp_path):
    before = source_hashes(config)
    assert list(before) == ["own_start:mine"] and len(before["own_start:mine"]) == 64
    assert changes(before, source_hashes(config)) == []
    with (tmp_path / "own_start.py").open("a") as file:
        file.write("# another line\n")
    assert changes(before, source_hashes(config)) == ["own_start:mine"]
    # Of older versions, of damage, of parts that were not there.
    for then in (None, {}, [], {"other:Part": "0"}):
        assert changes(then, source_hashes(config)) == []


def test_a_change_is_a_line_and_no_error(config, capsys):
    then = source_hashes(config)
    notice_changed_code(config, {"own_code_sha256": then}, 40)
    notice_changed_code(config, {}, 40)
    assert capsys.readouterr().err == ""
    notice_changed_code(config, {"own_code_sha256": {"own_start:mine": "0" * 64}}, 40)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "own_start:mine has changed since step 40 was saved" in said


def test_built_in_parts_have_no_hash():
    assert source_hashes(config_lib.resolve(config_lib.defaults())) == {}
