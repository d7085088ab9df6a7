"""docs/config.md: what tools/config_page.py writes, and how it reads what classes say of their fields."""

import dataclasses
import re

import pytest

from scaling_dit import config as config_lib
from scaling_dit.config import conditions, metrics, schema
from scaling_dit.data import sources
from tools import config_page


def test_the_page_is_what_the_script_writes():
    message = "docs/config.md is not what the code declares; run: python -m tools.config_page"
    assert config_page.PAGE.read_text() == config_page.text(), message


def test_every_field_has_a_row_and_one_line():
    text = config_page.PAGE.read_text()
    for key, field in schema.FIELDS.items():
        # A bar would end the cell.
        default = repr(field.default).replace("|", r"\|")
        assert f"\n| `{key}` | `{default}` | {field.doc}" in text
        assert "\n" not in field.doc and not field.doc.endswith(".")


def test_every_built_in_component_has_its_fields():
    text = config_page.PAGE.read_text()
    for section in schema.COMPONENTS:
        part = text.split(f"\n### `{section}`\n")[1].split("\n### ")[0]
        for name in config_page._registry(config_page.MODULES[section]).known:
            rows = part.split(f"\n#### `{name}`\n")[1].split("\n#### ")[0]
            config = config_lib.defaults()
            placed = section == "source" and sources.SOURCES[name].form
            config[section] = {"name": f"{name}:x" if placed else name}
            fields = set(config_lib.complete(config)[section]) - {"name"}
            assert set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == fields


@pytest.mark.parametrize("sections", [metrics.SECTIONS, conditions.SECTIONS], ids=lambda one: one.group)
def test_every_metric_and_condition_has_its_fields(sections):
    part = config_page.PAGE.read_text().split(f"\n### `{sections.group}`\n")[1].split("\n### ")[0]
    for name in sections.registry.known:
        rows = part.split(f"\n#### `{name}`\n")[1].split("\n#### ")[0]
        assert re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE) == list(sections.fields(name))


@dataclasses.dataclass
class Base:
    """A class.

    Attributes:
      first: one line
        and another.
      second: replaced below.
    """

    first: int = 1
    second: int = 2


@dataclasses.dataclass
class Derived(Base):
    """Another.

    Attributes:
      second: its own.

    Raises:
      third: no field.
    """

    third: int = 3  # said beside
    # Said above, of an MLP,
    # on two lines.
    fourth: str = "#"
    fifth: int = 5


def test_classes_and_their_bases_say_what_fields_are(monkeypatch):
    for known in (Base, Derived):
        monkeypatch.setattr(known, "__module__", "scaling_dit.made_up")
    monkeypatch.setattr(config_page.inspect, "getsource", lambda known: SOURCES[known])
    assert config_page.field_docs(Derived) == {
        "first": "one line and another",
        "second": "its own",
        "third": "said beside",
        "fourth": "said above, of an MLP, on two lines",
    }


# Read before `__module__` is changed.
SOURCES = {known: config_page.inspect.getsource(known) for known in (Base, Derived)}
