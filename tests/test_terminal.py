"""What comes from data, files or other programs reaches terminals, logs and TensorBoard without control characters."""

import json
import logging
import types

import numpy as np
import pytest
from absl import logging as absl_logging
from etils import epath

from scaling_dit.curation import filter_pipeline, filters, job, statistics
from scaling_dit.data.damage import Damage, DamagedRecord
from scaling_dit.data.sources import create_source
from scaling_dit.errors import UserError, printable
from scaling_dit.monitor import writers
from scaling_dit.monitor.grid import captioned_grid

# Colours, moves, titles, bells, hyperlinks, C1, the writing direction turned, half of an emoji.
EVIL = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://example.org\x1b\\click",
    "clear": "\x1bc\x1b[2J",
    "back": "shown\rhidden\x08\x08",
    "c1": "\x9b31m\x85\x9d",
    "direction": "abc\u202edcba\u2066x\u2069",
    "separators": "one\u2028two\u2029three",
    "surrogate": "half \ud83d",
    "nul": "a\0b",
}


def is_safe(text):
    return (
        all(letter.isprintable() or letter == "\n" for letter in text)
        and text == text.encode("utf-8", "ignore").decode()
    )


@pytest.mark.parametrize("kind", EVIL)
def test_text_as_a_terminal_may_have_it(kind):
    shown = printable(EVIL[kind])
    assert is_safe(shown) and "\n" not in shown
    assert printable(shown) == shown
    assert printable("été 日本 🙂 \\n") == "été 日本 🙂 \\n"
    assert printable("a\n\tb\x1b", keep="\n") == "a\n\\tb\\x1b"


@pytest.mark.parametrize("kind", EVIL)
def test_an_error_is_one_safe_line(kind):
    said = str(UserError(f"first {EVIL[kind]}\nsecond\n"))
    assert is_safe(said) and "\n" not in said and said.startswith("first ") and said.endswith(" second")
    assert len(str(UserError(EVIL[kind] * 10_000))) < 4100


@pytest.mark.parametrize("kind", [kind for kind in EVIL if kind not in ("link", "nul", "surrogate")])
def test_names_in_data_reach_the_log_escaped(kind, tmp_path, caplog):
    rows = [{"file_name": f"{EVIL[kind]}-{number}.png", "text": EVIL[kind]} for number in range(12)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = create_source(f"folder:{tmp_path}", max_damaged=10**6, held_out_fraction=0.0)
    absl_logging.use_python_logging()
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as error:
        source[0]
    messages = [record.getMessage() for record in caplog.records]
    assert messages and all(map(is_safe, messages)) and all("\n" not in text for text in messages)
    assert is_safe(str(error.value))


def test_the_list_of_damage_is_read_back_as_it_was(tmp_path):
    path = epath.Path(tmp_path) / "damaged.jsonl"
    damage = Damage()
    damage.meet(DamagedRecord("bad_line", "a line 1", EVIL["colour"]))
    damage.save(path)
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["what"] == EVIL["colour"]
    # A list that someone else wrote into.
    path.write_bytes(b'[1]\n"x"\n\xff\n{"where": "b", "kind": "k", "what": "w"}\n')
    damage = Damage()
    damage.meet(DamagedRecord("bad_line", "c", "d"))
    damage.save(path)
    assert [json.loads(line)["where"] for line in path.read_text().splitlines()] == ["b", "c"]


@pytest.mark.parametrize("kind", EVIL)
def test_tables_of_a_data_set_are_safe(kind, tmp_path):
    found = {"samples": 2, "kept": 1, "dropped": {f"missing:{EVIL[kind]}": 1}}
    assert is_safe(filter_pipeline.table(found, epath.Path(tmp_path)))

    made = types.SimpleNamespace(
        records={"train": 1, "held_out": 0},
        read=2,
        inputs=1,
        left_out={"damaged": {"count": 1, "examples": [{"where": EVIL[kind]}]}},
    )
    assert is_safe(job.summary(epath.Path(tmp_path), made))
    counted = {
        "aesthetic": {"mean": None, "images": 0, "column": EVIL[kind]}, "table": {}, "images": 1, "per_caption": {},
        "nouns_by": "lexicon", "damaged": {EVIL[kind]: 1}, "captions": {}, "density": {EVIL[kind]: {}},
    }  # fmt: skip
    assert is_safe(statistics.table(counted))


def test_captions_of_a_grid_are_bounded():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    short = captioned_grid(images, ["a", "b"])
    long = captioned_grid(images, ["a " * 10**6, EVIL["colour"]])
    assert long.shape[0] < 20 * short.shape[0]


@pytest.fixture
def board(monkeypatch):
    """What a `TensorBoardWriter` hands to clu."""
    calls = []

    class Summary:
        def __getattr__(self, name):
            return lambda *args: calls.append((name, args))

    writer = writers.TensorBoardWriter.__new__(writers.TensorBoardWriter)
    writer._writer, writer.off, writer._directory = Summary(), False, "tensorboard"
    return writer, calls


@pytest.mark.parametrize(
    "evil", [*EVIL.values(), "<script>alert(1)</script>", "[a](javascript:x)", "`</code>`"]
)
def test_tensorboard_gets_neither_control_characters_nor_markup(evil, board):
    writer, calls = board
    writer.scalars(1, {evil: 1.0, "train/loss": 2.0})
    writer.images(1, {evil: np.zeros((1, 1, 3), np.uint8)})
    writer.hparams({"name": evil})
    writer.parameter_overview({evil: np.zeros(2)})
    (_, (_, scalars)), (_, (_, images)), (_, (shown,)), (_, (_, texts)) = calls
    for name in (*scalars, *images):
        assert is_safe(name) and not set(name) & set("<>[]()`\\&*\n")
    assert "train/loss" in scalars and is_safe(shown["name"])
    # Markdown takes a line indented by four for code, in which it reads nothing.
    assert all(line.startswith("    ") and is_safe(line) for line in texts["parameter_overview"].split("\n"))


# The filter expression


@pytest.mark.parametrize(
    "expression",
    [
        "a > " + "(" * 90 + "1" + ")" * 90 + " and " + "not " * 200 + "b",
        "not " * 900 + "a",
        "-" * 3000 + "1 > a",
        "a" + " + a" * 990 + " > 1",
        "[" * 150 + "]" * 150 + " == a",
        "(" * 250 + "a" + ")" * 250,
        "a > 1 and " * 500 + "a",
        "2 ** 2 ** 2 ** 30 > a",
        "a ** 9999 > 1",
        "1 << 99999 > a",
        "9" * 5000 + " > a",
        "'x' * 10 ** 9 == a",
        "a.__class__ == 1",
        "(lambda: 1)() == a",
        "[x for x in a] == a",
        "a[0] == 1",
        "__import__('os').system('true') == a",
        "open('x') == a",
        "f'{a}' == 'x'",
        "(a := 1) == 1",
        "a if b else c",
        "print(a) == 1",
        "len(*a) == 1",
        "max(a, b, key=c) == 1",
        "1j == a",
        "b'x' == a",
        "... == a",
        "a == 1; b",
        "",
        "\x00",
        "a == '\x1b[31m' +",
    ],
)
def test_the_filter_stays_closed(expression):
    with pytest.raises(UserError) as error:
        filters.parse(expression)
    assert is_safe(str(error.value))


def test_what_a_filter_computes_stays_small():
    huge = "a * a * a * a > 1 and a % 7 >= 0"
    for value in (10**300, 10**4000, 1e308, float("inf"), -(10**4000)):
        filters.parse(huge)({"a": value})
    assert filters.parse("number(text) > 1").why_not({"text": "9" * 5000}) is None
