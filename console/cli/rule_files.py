"""Trigger rules and roll-out plans in YAML files: validated, and wrong ones named by file, line and column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.plans.trigger_rule import TriggerRule


class _Loader(yaml.SafeLoader):
    """YAML 1.2's booleans: the key `on` is a text, not "true" as in YAML 1.1."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))


def read(file: Path) -> list[tuple[dict[str, Any], yaml.Node]]:
    """The documents of a file, each with its syntax tree.

    Raises:
        ConfigError: no such file, or not YAML; with the position.
    """
    try:
        text = file.read_text(encoding="utf-8")
        nodes = [n for n in yaml.compose_all(text, Loader=_Loader) if n is not None]
        documents = [d for d in yaml.load_all(text, Loader=_Loader) if d is not None]
    except OSError as exc:
        raise ConfigError(str(file), f"cannot be read: {exc.strerror}") from exc
    except yaml.MarkedYAMLError as exc:
        raise ConfigError(_at(file, exc.problem_mark), f"is not YAML: {exc.problem}") from exc
    for document, node in zip(documents, nodes, strict=True):
        if not isinstance(document, dict):
            raise ConfigError(_at(file, node.start_mark), "must be a mapping", "See docs/triggers.md, docs/rollouts.md")
    return list(zip(documents, nodes, strict=True))


def validate(file: Path, document: dict[str, Any], node: yaml.Node) -> TriggerRule:
    """Raises ConfigError with the position of the field that is wrong."""
    try:
        return TriggerRule.model_validate(document)
    except ValidationError as exc:
        first = exc.errors()[0]
        path = [p for p in first["loc"] if p not in ("run", "round", "rollout")]
        field = ".".join(map(str, path)) or "rule"
        raise ConfigError(f"{_at(file, _find(node, path))}: {field}", first["msg"], "See docs/triggers.md") from exc


def _find(node: yaml.Node, path: Sequence[int | str]) -> yaml.Mark | None:
    """Where the field at `path` stands, or the last part of the path that is there."""
    for key in path:
        if isinstance(node, yaml.MappingNode):
            found = next((v for k, v in node.value if k.value == str(key)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            found = node.value[key]
        else:
            found = None
        if found is None:
            break
        node = found
    return node.start_mark


def _at(file: Path, mark: yaml.Mark | None) -> str:
    return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(file)
