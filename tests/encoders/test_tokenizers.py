"""Subword tokenizers from every file they come in, against transformers, open_clip and SentencePiece."""

import gzip
import html
import json
import random
import re
import sys
import time
import types

import ftfy
import numpy as np
import pytest
import sentencepiece
import transformers
from etils import epath

from scaling_dit.encoders import vocabularies
from scaling_dit.encoders.subwords import SubwordTokenizer
from scaling_dit.errors import UserError
from tests.support import text_towers
from tests.support.text_towers import HARD

BEGIN, END = 49_406, 49_407


def read(path):
    return SubwordTokenizer(vocabularies.read(epath.Path(path)))


@pytest.fixture(scope="module")
def clip():
    return read(text_towers.clip_vocabulary())


@pytest.fixture(scope="module")
def reference():
    """transformers' tokenizer of CLIP."""
    vocabulary, merges = text_towers.clip_words()
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


def expected(tokenizer, captions, length):
    found = tokenizer(list(captions), truncation=True, max_length=length, padding="max_length")
    return np.array(found["input_ids"]), np.array(found["attention_mask"], bool)


@pytest.mark.parametrize("length", [77, 16, 2])
def test_ids_of_clip_are_those_of_transformers(clip, reference, length):
    ids, mask = clip.encode(HARD, length, pad_id=END)
    theirs, their_mask = expected(reference, HARD, length)
    for caption, ours, wanted in zip(HARD, ids, theirs, strict=True):
        np.testing.assert_array_equal(ours, wanted, err_msg=repr(caption))
    np.testing.assert_array_equal(mask, their_mask)
    assert ids.dtype == np.int32
    assert (ids[:, 0] == BEGIN).all()
    # A cut caption too.
    assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == END).all()


def open_clip_tokenizer(monkeypatch):
    """open_clip's own, loaded from its file; it uses torch only to hold what it returns."""
    (folder,) = (text_towers.clip_vocabulary().parent,)
    module = types.ModuleType("open_clip_tokenizer")
    module.__file__ = str(folder / "tokenizer.py")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    # The file changes it.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    exec(compile((folder / "tokenizer.py").read_text(), module.__file__, "exec"), module.__dict__)
    return module._tokenizer


def test_ids_of_clip_are_those_of_open_clip_on_repaired_captions(clip, monkeypatch):
    """open_clip repairs a caption first, and leaves characters decomposed; the rest is the same."""
    theirs = open_clip_tokenizer(monkeypatch)
    captions = [caption for caption in HARD if "<|" not in caption and "\u0301" not in caption]
    assert len(captions) >= len(HARD) - 2
    repaired = [html.unescape(html.unescape(ftfy.fix_text(caption))) for caption in captions]
    ids, _ = clip.encode(repaired, 77, pad_id=0)
    np.testing.assert_array_equal(ids, theirs(captions).numpy())


def test_every_file_of_clip_gives_the_same_ids(clip, reference, tmp_path):
    reference.save_pretrained(tmp_path / "json")
    assert (tmp_path / "json/tokenizer.json").exists()
    text_towers.save_clip_words(tmp_path / "pair")
    wanted = clip.encode(HARD, 77, 0)
    files = ("json", "json/tokenizer.json", "pair", "pair/vocab.json")
    for file in files:
        np.testing.assert_array_equal(read(tmp_path / file).encode(HARD, 77, 0), wanted)


def test_what_a_workdir_keeps(clip, tmp_path):
    clip.save(tmp_path / "tokenizer.json")
    loaded = SubwordTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded == clip
    assert (loaded.frame, len(loaded)) == ((BEGIN, END), 49_408)
    kept = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert kept(HARD[0])["input_ids"] == [i for i in clip.encode(HARD[:1], 20, 0)[0][0] if i]
    with pytest.raises(UserError, match=r"no tokenizer at .*absent.json; `train` writes it"):
        SubwordTokenizer.load(tmp_path / "absent.json")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The folder of a small unigram model with T5's special ids, trained on some of the hard captions."""
    folder = tmp_path_factory.mktemp("pieces")
    rng = random.Random(0)
    words = " ".join(HARD[:12]).split() + ["the", "photo", "of", "circle", "square", "left", "right"] * 5
    lines = [" ".join(rng.choices(words, k=8)) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), model_type="unigram", vocab_size=150,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder


def test_ids_of_t5_are_those_of_transformers_and_sentencepiece(pieces):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "spiece.model"))
    found, unknown, charsmap = vocabularies._sentence_piece((pieces / "spiece.model").read_bytes())
    size = processor.get_piece_size()
    assert [piece for piece, _ in found] == [processor.id_to_piece(i) for i in range(size)]
    np.testing.assert_allclose([score for _, score in found], [processor.get_score(i) for i in range(size)])
    assert unknown == processor.unk_id() == 2
    # The rules of nmt_nfkc.
    assert len(charsmap) > 10_000

    ours = read(pieces)
    assert (ours.frame, len(ours)) == ((1,), size + 100)
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    theirs = transformers.T5Tokenizer(vocab=[*found, *sentinels], _spm_precompiled_charsmap=charsmap)
    ids, mask = ours.encode(HARD, 120, pad_id=0)
    wanted, wanted_mask = expected(theirs, HARD, 120)
    for caption, row, right in zip(HARD, ids, wanted, strict=True):
        np.testing.assert_array_equal(row, right, err_msg=repr(caption))
    np.testing.assert_array_equal(mask, wanted_mask)
    for caption, row, real in zip(HARD, ids, mask, strict=True):
        # SentencePiece itself takes marks for text.
        if "<" not in caption:
            assert row[real].tolist() == [*processor.encode(caption)[:119], 1], repr(caption)


def test_a_tokenizer_json_of_t5_gives_the_same_ids(pieces, tmp_path):
    ours = read(pieces / "spiece.model")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=vocabularies.parse(ours.definition))
    theirs.save_pretrained(tmp_path)
    np.testing.assert_array_equal(read(tmp_path).encode(HARD, 30, 0), ours.encode(HARD, 30, 0))


def test_where_the_tokenizer_of_weights_is_looked_for(tmp_path, clip):
    def found(weights):
        return SubwordTokenizer(vocabularies.find(epath.Path(weights)))

    for folder in ("text_encoder", "text_encoder_2", "whole", "sub"):
        (tmp_path / folder).mkdir()
    weights = tmp_path / "text_encoder/model.safetensors"
    weights.touch()
    with pytest.raises(
        UserError, match=r"no tokenizer with the weights in .*text_encoder: none of .*tokenizer holds"
    ):
        found(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    clip.save(tmp_path / "tokenizer/tokenizer.json")
    assert found(tmp_path / "text_encoder") == found(weights) == clip
    with pytest.raises(UserError, match=r"tokenizer_2 holds"):
        found(tmp_path / "text_encoder_2")
    other = SubwordTokenizer(clip.definition.replace('"version": "1.0"', '"version":  "1.0"'))
    for place, beside in (("tokenizer_2", "text_encoder_2"), ("whole", "whole"), ("sub/tokenizer", "sub")):
        (tmp_path / place).mkdir(exist_ok=True)
        other.save(tmp_path / place / "tokenizer.json")
        assert found(tmp_path / beside) == other


def test_fields_name_a_tokenizer_or_none(tmp_path):
    for fields in ({}, {"weights": ""}, {"weights": "random", "tokenizer_files": ""}):
        assert SubwordTokenizer.read(fields) is None
    given = SubwordTokenizer.read(
        {"weights": "random", "tokenizer_files": str(text_towers.clip_vocabulary())}
    )
    assert given.frame == (BEGIN, END)
    with pytest.raises(UserError, match=r"config.text_encoder.weights is '/no/such': no such file or folder"):
        SubwordTokenizer.read({"weights": "/no/such"})
    with pytest.raises(
        UserError, match=r"no tokenizer at /no/such; it must be tokenizer.json, vocab.json with"
    ):
        SubwordTokenizer.read({"tokenizer_files": "/no/such"})


def test_damaged_files(pieces, tmp_path):
    def refuses(name, content, line):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged or no tokenizer: {line}"):
            read(path)

    whole = (pieces / "spiece.model").read_bytes()
    refuses("cut.model", whole[: len(whole) // 2], "it ends within a field, at byte")
    refuses("text.model", b"\xff\xff", "it ends within a number")
    refuses("bpe.model", b"\x12\x02\x18\x02", "it is no unigram model")
    refuses("empty.model", b"", "it has no unknown piece")
    refuses("tokenizer.json", b'{"version": "1.0"}', "")
    refuses("short.txt.gz", gzip.compress(b"#version\na b\n"), "it has 1 merges, not 48894")
    refuses("no.txt.gz", b"not gzip", "Not a gzipped file")
    (tmp_path / "merges.txt").write_text("a b c\n")
    refuses("vocab.json", json.dumps({"a": 0}).encode(), "too many values")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges.txt is missing, which vocab.json needs"):
        read(tmp_path / "vocab.json")


def test_a_batch_of_captions_is_fast(clip):
    """Far below what two free cores do, so that it only fails where captions go one by one."""
    captions = [
        f"a photo of {i} dogs that run through the park on a sunny day, left of a tree" for i in range(2048)
    ]
    clip.encode(captions, 77, 0)
    start = time.process_time()
    clip.encode(captions, 77, 0)
    assert len(captions) / (time.process_time() - start) > 5_000
