"""Prompts from arguments and files, and what is wrong with a file, by line."""

import re

import pytest

from scaling_dit.errors import UserError
from scaling_dit.sampling.prompts import gather_prompts


def test_arguments_are_numbered():
    assert gather_prompts(["a circle", "a square"]) == [("00000", "a circle"), ("00001", "a square")]


def test_a_text_file_is_numbered_on_and_empty_lines_do_not_count(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a circle\n\n  a square \n")
    expected = [("00000", "first"), ("00001", "a circle"), ("00002", "a square")]
    assert gather_prompts(["first"], str(path)) == expected


def test_jsonl_brings_its_ids(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a1", "prompt": "x"}\n{"prompt": "y"}\n{"id": 7, "prompt": "z", "more": 1}\n')
    assert gather_prompts([], str(path)) == [("a1", "x"), ("00001", "y"), ("7", "z")]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no prompts"),
        ("{", "prompts.jsonl, line 1 is not JSON"),
        ('{"prompt": "a"}\n\n{"text": "a"}', "prompts.jsonl, line 3 has no text under 'prompt'"),
        ('["a"]', "line 1 has no text"),
        ('{"prompt": 3}', "line 1 has no text"),
        ('{"id": "../x", "prompt": "a"}', "line 1: the id '../x' cannot name a file"),
        ('{"id": "a", "prompt": "a"}\n{"id": "a", "prompt": "b"}', "two prompts have the id 'a'"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        gather_prompts([], str(path))


def test_no_such_file():
    with pytest.raises(UserError, match="no file nowhere.txt"):
        gather_prompts(["a"], "nowhere.txt")
