"""Conditions in prepared sets: the bytes of a record, the manifest, and what a run asks of a set."""

import json

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from scaling_dit.data.prepared import manifest, records
from scaling_dit.errors import UserError
from scaling_dit.model.codec_identity import check_conditions, check_makers
from tests.support.prepared_records import CODEC, prepared


def with_conditions(number):
    rng = np.random.default_rng(number)
    held = {
        "inpaint": rng.standard_normal((3, 2, 2, 7)).astype(ml_dtypes.bfloat16),
        "edges": rng.standard_normal((1, 2, 2, 6)).astype(ml_dtypes.bfloat16),
    }
    return prepared(number)._replace(conditions=held)


def test_a_record_with_conditions_comes_back_and_one_without_has_the_bytes_it_had():
    record = with_conditions(4)
    data = records.encode(record)
    found = records.decode(data)
    np.testing.assert_array_equal(found.moments, record.moments)
    assert list(found.conditions) == ["edges", "inpaint"]
    for name, array in record.conditions.items():
        np.testing.assert_array_equal(found.conditions[name], array)
    # The layout that the module states, read by hand.
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert data[:4] == b"SDL2"
    assert header["conditions"] == {"inpaint": [3, 2, 2, 7], "edges": [1, 2, 2, 6]}
    arrays = np.frombuffer(data[8 + size :], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(arrays[24:48].reshape(1, 2, 2, 6), record.conditions["edges"])
    plain = records.encode(prepared(4))
    assert plain[:4] == b"SDL1" and b"conditions" not in plain


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_cut_record_is_refused(cut):
    with pytest.raises(ValueError, match="do not make up"):
        records.decode(records.encode(with_conditions(1))[:-cut])


def test_conditions_of_another_grid_are_refused():
    bad = prepared(1)._replace(conditions={"edges": np.zeros((1, 3, 2, 6), ml_dtypes.bfloat16)})
    with pytest.raises(ValueError, match="condition 'edges' must be bfloat16"):
        records.encode(bad)


def made(**fields):
    return manifest.merge([], codec=CODEC, image_size=16, moments={"16x16": [2, 2, 6]}, request={}, **fields)


def test_a_manifest_has_conditions_only_where_there_are_some(tmp_path):
    plain = json.loads(made().to_json())
    assert plain["format"] == 1 and "conditions" not in plain
    held = {"edges": {"masks": 0, "variants": 1, "seed": 0, "fields": {"sigma": 1.0}}}
    (tmp_path / manifest.MANIFEST).write_text(made(conditions=held).to_json())
    found = manifest.read(epath.Path(tmp_path))
    assert found.format == 2 and found.conditions == held and found == made(conditions=held)
    text = (tmp_path / manifest.MANIFEST).read_text()
    (tmp_path / manifest.MANIFEST).write_text(text.replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match="is of format 3; this version reads 1 and 2"):
        manifest.read(epath.Path(tmp_path))


def test_a_run_gets_the_conditions_it_asks_for_or_one_line():
    held = {"inpaint": {"masks": 1, "variants": 4, "seed": 0, "fields": {"boxes": 0.4, "sides": ["top"]}}}
    check_conditions(held, {}, "set")
    check_conditions(held, {"inpaint": {"boxes": 0.4, "sides": ("top",)}}, "set")
    with pytest.raises(UserError, match="set holds no condition 'edges'; it holds inpaint; prepare it with"):
        check_conditions(held, {"edges": {}}, "set")
    with pytest.raises(UserError, match="it holds none"):
        check_conditions({}, {"edges": {}}, "set")
    with pytest.raises(UserError, match=r"conditions.inpaint.boxes 0.4; the run has 0.5; set config"):
        check_conditions(held, {"inpaint": {"boxes": 0.5, "sides": ("top",)}}, "set")


def test_a_set_says_which_class_made_its_conditions():
    held = {
        "Grey": {"name": "a:Grey", "sha256": "0" * 64, "masks": 0, "variants": 1, "seed": 0, "fields": {}}
    }
    check_makers(held, {"Grey": {"name": "a:Grey", "masks": 0}}, "set")
    # Sets of earlier versions do not.
    check_makers({"Grey": {"masks": 0, "fields": {}}}, {"Grey": {"name": "b:Grey", "masks": 0}}, "set")
    for wrong, message in (
        ({"name": "b:Grey", "masks": 0}, "a condition 'Grey' of name 'a:Grey'; the run's has 'b:Grey'"),
        ({"name": "a:Grey", "masks": 1}, "a condition 'Grey' of masks 0; the run's has 1"),
    ):
        with pytest.raises(UserError, match=message):
            check_makers(held, {"Grey": wrong}, "set")
