"""Trigger rules and roll-out plans in YAML files: validated, and wrong ones named by file, line and column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fedtide.console.cli.grammar import read_text
from fedtide.console.yaml12 import CoreLoader
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.validation import config_error

M = TypeVar("M", bound=BaseModel)

_DOCS = "See docs/triggers.md, docs/rollouts.md"


def read(file: Path) -> list[tuple[dict[str, Any], yaml.Node]]:
    """The documents of a file, each with its syntax tree.

    Raises:
        ConfigError: no such file, not YAML, or empty; with the position.
    """
    text = read_text(file)
    try:
        nodes = [n for n in yaml.compose_all(text, Loader=CoreLoader) if n is not None]
        documents = [d for d in yaml.load_all(text, Loader=CoreLoader) if d is not None]  # a SafeLoader
    except yaml.MarkedYAMLError as exc:
        raise ConfigError(_at(file, exc.problem_mark), f"is not YAML: {exc.problem}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(str(file), f"is not YAML: {exc}") from exc
    nodes = [n for n in nodes if not (isinstance(n, yaml.ScalarNode) and n.tag.endswith(":null"))]
    if not documents:
        raise ConfigError(str(file), "holds nothing", _DOCS)
    for document, node in zip(documents, nodes, strict=True):
        if not isinstance(document, dict):
            raise ConfigError(_at(file, node.start_mark), "must be a mapping", _DOCS)
    return list(zip(documents, nodes, strict=True))


def validate(file: Path, document: dict[str, Any], node: yaml.Node, kind: type[M]) -> M:
    """Raises ConfigError with the position of the field that is wrong."""
    try:
        return kind.model_validate(document)
    except ValidationError as exc:
        path = [p for p in exc.errors()[0]["loc"] if p not in ("run", "round", "rollout")]
        wrong = config_error(exc, kind)
        where = f"{_at(file, _find(node, path))}: {'.'.join(map(str, path)) or kind.__name__}"
        raise ConfigError(where, wrong.problem, wrong.remedy or _DOCS) from exc


def at(file: Path, node: yaml.Node, *path: str) -> str:
    """The position of a field, for an error."""
    return f"{_at(file, _find(node, path))}: {'.'.join(path)}"


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
