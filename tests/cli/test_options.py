"""Flags as fields of a dataclass: every type of field from the command line, rules, and groups."""

import dataclasses
from typing import Any, Literal

import pytest

from scaling_dit.cli.options import changes, declared, flag, group
from scaling_dit.cli.verb import Verb, split_overrides
from scaling_dit.errors import UserError
from scaling_dit.fields import COUNT, Field, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    runner: str = flag("a runner", "here")
    json: bool = flag("as JSON", False)


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = dataclasses.field(default=50, metadata={"declared": Field(50, "steps", COUNT)})
    span: tuple[float, float] = dataclasses.field(
        default=(0.0, 1.0), metadata={"declared": Field((0.0, 1.0), "a span")}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work(Verb):
    """Works. It is a test.

    This is not in the help.
    """

    EXAMPLE = "scaling-dit work --from=here"
    ARGUMENTS = "[FILE ...]"
    OVERRIDES = True

    from_: str = flag("where it begins", required=True)
    number: int = flag("a count", 3, COUNT)
    share: float | None = flag("a share", None, Rule("from 0 to 1", lambda x: 0 <= x <= 1))
    kind: Literal["long", "short"] = flag("a kind", "long")
    maybe: Literal["x"] | None = flag("only x")
    words: tuple[str, ...] = flag("words", ())
    note: str = flag("a note", "none", empty=True)
    shape: tuple[int, ...] | None = flag("a shape", None, Rule("two numbers", lambda xs: len(xs) == 2))
    often: tuple[str, ...] = flag("repeat it", (), repeat=True)
    shared: Shared = group(Shared)
    settings: dict[str, Any] = changes(Settings)


def test_fields_have_the_values_of_their_flags():
    made = Work.parse(
        ["file", "--from=a", "--number=0x10", "--share=.5", "--kind=short", "--maybe=x", "--words=a, b", "--shape=2,3",
         "--often=1", "--often=2,3", "--runner=there", "--json", "--steps=4", "--span=1,2", "--config.a", "b", "more"]
    )  # fmt: skip
    assert (made.from_, made.number, made.share, made.kind, made.maybe) == ("a", 16, 0.5, "short", "x")
    assert (made.words, made.shape, made.often) == (("a", "b"), (2, 3), ("1", "2,3"))
    assert made.shared == Shared(runner="there", json=True)
    assert made.settings == {"steps": 4, "span": (1.0, 2.0)}
    assert (made.arguments, made.overrides) == (("file", "more"), ("--config.a=b",))
    assert made.command[:2] == ("work", "file") and made.command[-1] == "more"


def test_what_is_not_given_has_its_default():
    made = Work.parse(["--from=a"])
    assert made == Work(from_="a", shared=Shared(), settings={}, command=("work", "--from=a"))
    assert (made.number, made.share, made.kind, made.words, made.shape) == (3, None, "long", (), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "work needs --from; for example: scaling-dit work --from=here"),
        (["--from="], "work needs --from"),
        (["--from=a", "--number=0"], "--number=0: it must be at least 1"),
        (["--from=a", "--number=two"], "--number=two: it must be an integer at least 1"),
        (["--from=a", "--share=nan"], "--share=nan: it must be from 0 to 1"),
        (["--from=a", "--kind=odd"], "value should be one of <long|short>"),
        (["--from=a", "--maybe=y"], "value should be one of <x>"),
        (["--from=a", "--shape=1"], "--shape=1: it must be two numbers"),
        (["--from=a", "--shape=1,b"], "--shape=1,b: it must be two numbers"),
        (["--from=a", "--span=1,b"], "--span=1,b: it must be numbers separated by commas"),
        (["--from=a", "--nubmer=1"], "work has no flag --nubmer; did you mean 'number'?"),
    ],
)
def test_a_mistake_says_what_would_be_right(arguments, message):
    with pytest.raises(UserError) as caught:
        Work.parse(arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["--words=", "--words=a,", "--often= ", "--runner="])
def test_an_empty_value_is_refused(value):
    name = value.partition("=")[0]
    with pytest.raises(UserError, match=f"^work: {name} is given an empty value"):
        Work.parse(["--from=a", value])


def test_an_empty_value_that_means_something_is_taken():
    assert Work.parse(["--from=a", "--note="]).note == ""


def test_flags_come_in_the_order_of_the_fields():
    names = [one.name for one in declared(Work)]
    assert names[:3] == ["from", "number", "share"] and names[-4:] == ["runner", "json", "steps", "span"]


def test_help_takes_one_line_of_the_docstring():
    assert Work.summary() == "Works. It is a test."
    assert "  --span " in Work.help() and "a span; the run's by default" in Work.help()
    assert "not in the help" not in Work.help()


def test_values_of_overrides_may_follow_them():
    rest, overrides = split_overrides(
        ["--config.a.b", "-1", "--x", "--config.c", "--config.d=2", "--noconfig.e"]
    )
    assert rest == ["--x"]
    assert overrides == ["--config.a.b=-1", "--config.c", "--config.d=2", "--noconfig.e"]
