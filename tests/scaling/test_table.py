"""What a study's table reads of its runs."""

import pytest

from scaling_dit.checkpoints.workdir import Workdir
from scaling_dit.errors import UserError
from scaling_dit.scaling import table


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\x00", b"[" * 100_000])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, content):
    run = Workdir(tmp_path)
    assert table._last(run) == -1
    run.config.write_text('{"steps": 7}')
    assert table._last(run) == 7
    run.config.write_bytes(content)
    with pytest.raises(UserError, match=r"config.json is damaged: .*; put the file back") as error:
        table._last(run)
    assert "\n" not in str(error.value)
