"""What a chart's `values.yaml` says: a table for people, and a JSON schema for Helm.

A value's type is that of its default; what more it must be is in `chart_rules.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

RULES = Path(__file__).with_name("chart_rules.yaml")
_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "seq": "array", "map": "object", "str": "string"}


def table(file: Path) -> str:
    """The values, with the comments that stand beside or above them, in Markdown."""
    root, lines = _read(file)
    return "\n".join(["| value | default | is |", "|---|---|---|", *_rows(root, "", lines)])


def schema(file: Path) -> str:
    """The JSON schema of the values, with those comments as descriptions."""
    root, lines = _read(file)
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    found = _object(root, "", lines, rules["values"])
    found["properties"]["global"] = {"type": "object"}  # Helm's own
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**draft, **found, "$defs": _used(found, rules["definitions"])}, indent=1) + "\n"


def _read(file: Path) -> tuple[yaml.MappingNode, list[str]]:
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode), file
    return root, text.splitlines()


def _rows(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[str]:
    for key, value in node.value:
        path, comment = f"{prefix}{key.value}", _comment(lines, key.start_mark.line).replace("|", "\\|")
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            if comment:
                yield f"| `{path}` | | {comment} |"
            yield from _rows(value, f"{path}.", lines)
        else:
            shown = json.dumps(yaml.SafeLoader("").construct_object(value, deep=True))
            yield f"| `{path}` | `{shown}` | {comment} |".replace("|  |", "| |")


def _object(node: yaml.MappingNode, prefix: str, lines: list[str], rules: dict[str, Any]) -> dict[str, Any]:
    fields = {key.value: _field(key, value, f"{prefix}{key.value}", lines, rules) for key, value in node.value}
    return {"type": "object", "additionalProperties": False, "properties": fields}


def _field(key: yaml.Node, value: yaml.Node, path: str, lines: list[str], rules: dict[str, Any]) -> dict[str, Any]:
    rule = next((rule for pattern, rule in rules.items() if fnmatchcase(path, pattern)), None)
    if rule is not None:
        made = {"$ref": f"#/$defs/{rule}"} if isinstance(rule, str) else dict(rule)
    elif isinstance(value, yaml.MappingNode) and value.value:
        made = _object(value, f"{path}.", lines, rules)
    else:
        made = {"type": _TYPES[value.tag.rpartition(":")[2]]}
    comment = _comment(lines, key.start_mark.line)
    return {"description": comment, **made} if comment else made


def _used(found: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Of the definitions those that are referred to."""
    wanted, text = set[str](), json.dumps(found)
    while fresh := {n for n in definitions if f'"#/$defs/{n}"' in text} - wanted:
        wanted |= fresh
        text = json.dumps([definitions[n] for n in wanted])
    return {name: definition for name, definition in definitions.items() if name in wanted}


def _comment(lines: list[str], number: int) -> str:
    """What stands behind a line; else above it."""
    _, behind, text = lines[number].partition(" # ")
    above: list[str] = []
    while not behind and (before := lines[number - 1 - len(above)].strip()).startswith("# ") and number:
        above.insert(0, before.removeprefix("# "))
    return (text or " ".join(above)).strip()
