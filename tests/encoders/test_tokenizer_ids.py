"""Ids outside an embedding table, and tokens added beside a vocabulary, are refused when a tokenizer is opened."""

import json

import pytest
from etils import epath

from scaling_dit.checkpoints.workdir import check_tokenizer, tokenizer_hash
from scaling_dit.encoders import clip, t5, vocabularies
from scaling_dit.encoders.scratch import WordTokenizer
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.errors import UserError


def clip_definition(extra=()):
    """CLIP's tokenizer with a few words at their places, and words beyond the table."""
    vocabulary = {
        "a": 0,
        "a</w>": 1,
        "<|startoftext|>": clip.VOCABULARY - 2,
        "<|endoftext|>": clip.VOCABULARY - 1,
    }
    return vocabularies.clip(vocabulary | dict(extra), [])


def t5_definition(pieces):
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"w{i}", -1.0) for i in range(pieces))]
    return vocabularies.t5(words, 2, b"")


@pytest.mark.parametrize(
    ("encoder", "definition", "line"),
    [
        (
            clip.ClipText,
            clip_definition({"<new>": clip.VOCABULARY}),
            "'<new>' the id 49408.* rows 0 to 49407",
        ),
        (clip.ClipText, clip_definition({"gap": 60_000}), "'gap' the id 60000"),
        (t5.T5Text, t5_definition(t5.VOCABULARY - 102), "the id 32128.* rows 0 to 32127"),
    ],
)
def test_ids_beyond_the_table_are_refused(encoder, definition, line):
    with pytest.raises(UserError, match=line):
        encoder(tokenizer=SubwordTokenizer(definition), size="tiny")


def test_ids_within_the_table_are_taken():
    clip.ClipText(tokenizer=SubwordTokenizer(clip_definition()), size="tiny")
    t5.T5Text(tokenizer=SubwordTokenizer(t5_definition(5)), size="tiny")


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("added_tokens.json", {"<new>": 49408}, "adds the token '<new>' with the id 49408"),
        ("added_tokens.json", {"a": 7}, "adds the token 'a' with the id 7"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"9": {"content": "<b>"}}},
            "adds the token '<b>'",
        ),
        ("added_tokens.json", ["<new>"], "damaged or adds no tokens"),
    ],
)
def test_added_tokens_beside_a_vocabulary_are_not_passed_over(tmp_path, file, content, line):
    (tmp_path / "tokenizer.json").write_text(clip_definition())
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=line):
        vocabularies.read(epath.Path(tmp_path))
    (tmp_path / file).write_text(json.dumps({"a": 0} if file == "added_tokens.json" else {}))
    vocabularies.read(epath.Path(tmp_path))


@pytest.mark.parametrize("words", ['"abc"', '["a", 3]', '["a", "b", "a"]', "{}"])
def test_words_that_make_no_tokenizer(tmp_path, words):
    (tmp_path / "tokenizer.json").write_text(f'{{"words": {words}}}')
    with pytest.raises(UserError, match=r"is no tokenizer|is damaged"):
        WordTokenizer.load(tmp_path / "tokenizer.json")


def test_a_changed_tokenizer_is_refused_and_old_checkpoints_open(tmp_path):
    tokenizer = WordTokenizer(("red", "blue"))
    new = tokenizer_hash(tmp_path, tokenizer)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert tokenizer_hash(tmp_path, WordTokenizer.load(tmp_path / "tokenizer.json")) == new
    check_tokenizer(new, {"tokenizer_sha256": new}, "here")
    check_tokenizer(new, {}, "here")
    WordTokenizer(("blue", "red")).save(tmp_path / "tokenizer.json")
    # A folder without a config holds no run, so what a start left there is not trusted.
    assert tokenizer_hash(tmp_path, tokenizer) == new
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="was trained with another tokenizer.json"):
        check_tokenizer(tokenizer_hash(tmp_path, tokenizer), {"tokenizer_sha256": new}, "here")
