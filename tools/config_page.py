"""Writes docs/config.md: every field of a config, as `scaling_dit.config.schema` and the components declare them.

    python -m tools.config_page

A test compares the page with what this script would write now.
"""

import ast
import importlib
import inspect
import pathlib
import re
import textwrap
from collections.abc import Iterable
from typing import Any

from scaling_dit.components import Registry
from scaling_dit.config import conditions, metrics, schema
from scaling_dit.config.named import NamedSections

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "config.md"
# Component section -> the module that knows its built-in components.
MODULES = {
    "backbone": "scaling_dit.backbones",
    "text_encoder": "scaling_dit.encoders",
    "codec": "scaling_dit.encoders.codec",
    "source": "scaling_dit.data.sources",
}
HEAD = """# Every field of a config

<!-- Written by tools/config_page.py; edit scaling_dit/config/schema.py or the component's class instead. -->

One run is one config. An experiment file sets some of its fields, and the command line any of them:
`--config.optim.learning_rate=1e-3`, `--config.optim.ema=0.99 --config.optim.ema=0.999` for a tuple,
`--noconfig.text_mask` for false. `config.json` in the working directory has them all. A value keeps the type of its
default, and what is out of range is refused before anything starts. How to add a field: [Extending](extending.md).

A run is resumed with the config it was started with. Only fields marked **free** may change in between: they change how
it runs and what it reports, not what it computes.
"""
COMPONENTS_HEAD = """
## Components

A component section names a component, built-in or a class of your own (`package.module:Class`), and carries that
component's fields.
"""
METRICS_HEAD = """
### `metrics`

Each metric that `config.eval.metrics` names has a section, `metrics.NAME`. **Free.**
"""
CONDITIONS_HEAD = """
### `conditions`

Each condition that `config.conditioning.names` names has a section, `conditions.NAME`. [What they are](conditions.md).
"""


def text() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += [_section(name, group) for name, group in schema.SECTIONS.items()]
    parts.append(COMPONENTS_HEAD)
    parts += [_component(name, component) for name, component in schema.COMPONENTS.items()]
    for head, named in ((METRICS_HEAD, metrics.SECTIONS), (CONDITIONS_HEAD, conditions.SECTIONS)):
        parts += [head, *(_named(named, name) for name in named.registry.known)]
    return "".join(parts)


def _section(name: str, group: schema.Section) -> str:
    title = f"`{name}`" if name else "The run"
    free = " **Free.**" if group.free else ""
    fields = {f"{name}.{field}" if name else field: declared for field, declared in group.fields.items()}
    rows = [
        (f"`{key}`", _value(declared.default), _described(key, declared)) for key, declared in fields.items()
    ]
    return f"\n## {title}\n\n{group.doc}{free}\n\n{_table(rows)}"


def _described(key: str, field: schema.Field) -> str:
    """What a field means and may be, as one cell."""
    found = field.doc
    if not all(choice in field.doc for choice in field.choices):
        found += ": " + ", ".join(f"`{choice}`" for choice in field.choices)
    if field.own:
        found += f", or [your own](own_parts.md) with its fields in `{schema.OWN_PARTS[key].section}`"
    if field.check is not None:
        found += f". Must be {field.check.right}"
    return f"{found}. **Free**" if field.free else found


def _component(section: str, component: schema.Component) -> str:
    parts = [f"\n### `{section}`\n\n{component.doc} `{section}.name` is `{component.default}` by default.\n"]
    for field, right in component.derived.items():
        parts.append(f"`{field}` is no field of a config: it {right}.\n")
    if component.free:
        parts.append(f"Free: {', '.join(f'`{field}`' for field in component.free)}.\n")
    registry = _registry(MODULES[section])
    for name in registry.known:
        docs = field_docs(registry.resolve(name))
        rows = [
            (f"`{field}`", _value(default), docs.get(field, ""))
            for field, default in registry.fields(name).items()
            if field not in component.derived
        ]
        summary = _summary(registry.resolve(name))
        if (PAGE.parent / f"{section}s" / f"{name}.md").exists():
            summary += f" [What its fields mean]({section}s/{name}.md)."
        parts.append(f"\n#### `{name}`\n\n{summary}\n\n{_table(rows) if rows else 'No fields.' + chr(10)}")
    return "".join(parts)


def _named(sections: NamedSections, name: str) -> str:
    """The section of one part that a list of names in the config may name."""
    component = sections.registry.resolve(name)
    docs = {field: _described(field, declared) for field, declared in sections.common.items()}
    docs |= field_docs(component)
    rows = [
        (f"`{field}`", _value(default), docs.get(field, ""))
        for field, default in sections.fields(name).items()
    ]
    return f"\n#### `{name}`\n\n{_summary(component)}\n\n{_table(rows)}"


def _registry(module: str) -> Registry:
    found = [value for value in vars(importlib.import_module(module)).values() if isinstance(value, Registry)]
    if len(found) != 1:
        raise ValueError(f"{module} has {len(found)} registries of components, not one")
    return found[0]


def _summary(component: type[Any]) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((inspect.getdoc(component) or "").partition("\n\n")[0].split())


def field_docs(component: type[Any]) -> dict[str, str]:
    """What a class and its bases say of their fields, in docstrings ("Attributes:") or comments."""
    found: dict[str, str] = {}
    for base in reversed(component.__mro__):
        if base.__module__.startswith("scaling_dit"):
            found |= _commented(base) | _attributes(vars(base).get("__doc__") or "")
    return found


def _attributes(docstring: str) -> dict[str, str]:
    """The entries of the section "Attributes:" of a docstring."""
    _, begun, rest = inspect.cleandoc(docstring).partition("Attributes:\n")
    block = re.split(r"\n(?=\S)", rest)[0] if begun else ""
    entries = re.split(r"\n(?=\w+: )", textwrap.dedent(block).strip())
    named = (entry.partition(": ") for entry in entries if entry)
    return {name: " ".join(meaning.split()).rstrip(".") for name, _, meaning in named}


def _commented(component: type[Any]) -> dict[str, str]:
    """Fields with a comment on their line, or on the lines above."""
    source = textwrap.dedent(inspect.getsource(component))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    found = {}
    for node in body.body if isinstance(body, ast.ClassDef) else []:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            trailing = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2]
            above = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, line.strip().lstrip("#").strip())
            if comment := trailing.strip() or " ".join(above):
                found[node.target.id] = _phrase(comment)
    return found


def _phrase(comment: str) -> str:
    """A comment as a cell: no capital letter at its start, unless of an acronym or a constant, and no full stop."""
    first = comment.split()[0].rstrip(",:")
    lower = first[0].isupper() and first[1:] == first[1:].lower() and first not in ("None", "True", "False")
    return (comment[0].lower() if lower else comment[0]) + comment[1:].rstrip(".")


def _value(value: Any) -> str:
    return f"`{value!r}`"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| field | default | what it is |", "|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(text())
    print(PAGE)


if __name__ == "__main__":
    main()
