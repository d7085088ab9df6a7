"""Reads the file formats of subword vocabularies; the result is the text of a `tokenizer.json`.

| file | format of |
|---|---|
| `tokenizer.json` | the `tokenizers` library, any model |
| `vocab.json` with `merges.txt` | CLIP in transformers |
| `bpe_simple_vocab_16e6.txt.gz` | CLIP of OpenAI and open_clip |
| `spiece.model` | T5, in SentencePiece's format |

Ids equal those of transformers' `CLIPTokenizer` and `T5Tokenizer`. Neither repairs a text. open_clip's own tokenizer
also decodes HTML entities and fixes broken encodings; here that is left to the preparation of captions.
"""

import base64
import gzip
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from scaling_dit.errors import UserError
from scaling_dit.files import parse_json

CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"
T5_END = "</s>"
# Sentinels of T5's pre-training, which follow the pieces.
T5_EXTRA_IDS = 100
# Merges used from CLIP's file, which has more lines.
_CLIP_MERGES = 49_152 - 256 - 2
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Where transformers keeps the tokens that were added to a vocabulary.
_ADDED = ("added_tokens.json", "tokenizer_config.json")
_KINDS = "tokenizer.json, vocab.json with merges.txt, spiece.model or bpe_simple_vocab_16e6.txt.gz"


def find(weights: epath.Path) -> str:
    """The tokenizer of a text encoder: in the folder of its weights, in `tokenizer/` there, or beside that folder.

    Args:
      weights: a folder or a file. Beside a pipeline's `text_encoder_2` the tokenizer is `tokenizer_2`.

    Raises:
      UserError: no tokenizer is found, or it is damaged.
    """
    folder = weights if weights.is_dir() else weights.parent
    sibling = (
        "tokenizer" + folder.name.removeprefix("text_encoder")
        if "text_encoder" in folder.name
        else "tokenizer"
    )
    places = (folder, folder / "tokenizer", folder.parent / sibling)
    for place in places:
        if _file_in(place) is not None:
            return read(place)
    raise UserError(
        f"no tokenizer with the weights in {weights}: none of {', '.join(map(str, places))} holds {_KINDS}; "
        "set config.text_encoder.tokenizer_files"
    )


def read(path: epath.Path) -> str:
    """The tokenizer in a folder or a file of the formats above, checked by the `tokenizers` library.

    Raises:
      UserError: the file is missing, damaged or of another format.
    """
    file = _file_in(path) if path.is_dir() else path
    if file is None or not file.exists():
        raise UserError(f"no tokenizer at {path}; it must be {_KINDS}, or a folder with one of these")
    try:
        if file.name == "vocab.json":
            definition = clip(
                parse_json(file.read_bytes()), _merges((file.parent / "merges.txt").read_text())
            )
        elif file.name.endswith(".txt.gz"):
            definition = clip(*_open_clip(gzip.decompress(file.read_bytes()).decode()))
        elif file.name.endswith(".model"):
            definition = t5(*_sentence_piece(file.read_bytes()))
        else:
            definition = file.read_text()
        tokenizer = parse(definition)
    except FileNotFoundError:
        raise UserError(f"{file.parent / 'merges.txt'} is missing, which vocab.json needs") from None
    except (ValueError, TypeError, KeyError, EOFError, OSError, zlib.error, struct.error) as error:
        raise UserError(f"{file} is damaged or no tokenizer: {error}") from None
    _check_added(tokenizer, file)
    return definition


def _check_added(tokenizer: Any, file: epath.Path) -> None:
    """Makes sure that the tokens that files beside a vocabulary add are in it: transformers would add them.

    Raises:
      UserError: a token that is not in it, or that has another id there.
    """
    for beside in (file.parent / name for name in _ADDED):
        if beside == file or not beside.exists():
            continue
        try:
            held = parse_json(beside.read_bytes())
            if beside.name == _ADDED[0]:
                added = {str(token): int(number) for token, number in held.items()}
            else:
                decoder = held.get("added_tokens_decoder", {})
                added = {str(token["content"]): int(number) for number, token in decoder.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{beside} is damaged or adds no tokens: {error}") from None
        for token, number in added.items():
            if tokenizer.token_to_id(token) != number:
                raise UserError(
                    f"{beside} adds the token {token!r} with the id {number}, which {file.name} does not have; give a "
                    f"folder with a tokenizer.json that holds it, or remove it from {beside.name}"
                )


def parse(definition: str) -> Any:
    """The `tokenizers.Tokenizer` that a `tokenizer.json` text defines.

    Raises:
      ValueError: the text defines none.
    """
    # Compiled code that only encoders with subwords need.
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(definition)
    # The library raises bare exceptions.
    except Exception as error:
        raise ValueError(error) from None


def clip(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> str:
    """CLIP's tokenizer: composed Unicode in lower case, byte pairs within words, begin and end tokens around a text."""
    words = {"type": "Split", "pattern": {"Regex": _CLIP_WORDS}, "behavior": "Removed", "invert": True}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    begin, end = (CLIP_BEGIN, vocabulary[CLIP_BEGIN]), (CLIP_END, vocabulary[CLIP_END])
    return _definition(
        special=(begin, end),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        pre_tokenizer={"type": "Sequence", "pretokenizers": [words, as_bytes]},
        post_processor={
            "type": "RobertaProcessing",
            "sep": end,
            "cls": begin,
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        model={
            "type": "BPE",
            "unk_token": CLIP_END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": dict(vocabulary),
            "merges": list(merges),
        },
    )


def t5(pieces: Sequence[tuple[str, float]], unknown: int, charsmap: bytes) -> str:
    """T5's tokenizer: the likeliest pieces of each word, which starts with a mark for its space, and an end token.

    Args:
      pieces: (piece, log probability), in the order of their ids.
      unknown: id of text that no piece covers.
      charsmap: SentencePiece's compiled Unicode rules; empty for none.
    """
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(T5_EXTRA_IDS))]
    vocabulary = [*pieces, *sentinels]
    ids = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    rules = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    framed = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": T5_END, "type_id": 0}}]
    pair = [*framed, {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": T5_END, "type_id": 0}}]
    marks = {T5_END: {"id": T5_END, "ids": [ids[T5_END]], "tokens": [T5_END]}}
    special = [(piece, ids[piece]) for piece in ("<pad>", T5_END, "<unk>") if piece in ids]
    return _definition(
        special=[*special, *((piece, ids[piece]) for piece, _ in sentinels)],
        normalizer=rules if charsmap else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        post_processor={
            "type": "TemplateProcessing",
            "single": framed,
            "pair": pair,
            "special_tokens": marks,
        },
        model={"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": False},
    )


def _definition(special: Sequence[tuple[str, int]], **parts: Any) -> str:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for token, i in special]
    parts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "decoder": None,
    } | parts
    return json.dumps(parts, ensure_ascii=False)


def _file_in(folder: epath.Path) -> epath.Path | None:
    """The vocabulary file in a folder; of several the newest format."""
    for name in ("tokenizer.json", "vocab.json", "spiece.model", "bpe_simple_vocab_16e6.txt.gz"):
        if (folder / name).exists():
            return folder / name
    return None


def _merges(text: str) -> list[tuple[str, str]]:
    pairs = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#version")]
    return [(first, second) for first, second in pairs]


def _open_clip(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) from CLIP's file. Ids go to bytes, bytes that end a word, merges, begin and end."""
    merges = _merges("\n".join(text.split("\n")[1 : _CLIP_MERGES + 1]))
    if len(merges) != _CLIP_MERGES:
        raise ValueError(f"it has {len(merges)} merges, not {_CLIP_MERGES}")
    # The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for code points from 256 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), CLIP_BEGIN, CLIP_END]
    return {word: i for i, word in enumerate(words)}, merges


def _sentence_piece(data: bytes) -> tuple[list[tuple[str, float]], int, bytes]:
    """(pieces with their scores, id of the unknown piece, Unicode rules) of a SentencePiece unigram model.

    This reads the few fields itself, because the library's own reader needs a version of protobuf that conflicts with
    TensorFlow and Beam. Field numbers are from sentencepiece_model.proto: pieces 1 (piece 1, score 2, type 3),
    trainer_spec 2 (model_type 3), normalizer_spec 3 (precompiled_charsmap 2).
    """
    pieces: list[tuple[str, float]] = []
    unknown, charsmap, kind = -1, b"", 1
    for number, value in _protobuf(data):
        if number == 1:
            piece = dict(_protobuf(value))
            if piece.get(3, 1) == 2:
                unknown = len(pieces)
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
        elif number == 2:
            kind = dict(_protobuf(value)).get(3, 1)
        elif number == 3:
            charsmap = dict(_protobuf(value)).get(2, b"")
    if kind != 1:
        raise ValueError("it is no unigram model")
    if unknown < 0:
        raise ValueError("it has no unknown piece")
    return pieces, unknown, charsmap


def _protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message. The value is an int for varints, else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {at} begins no field")
        if at + size > len(data):
            raise ValueError(f"it ends within a field, at byte {len(data)}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, end position) of an integer in groups of 7 bits, the lowest first."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError(f"it ends within a number, at byte {len(data)}")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
