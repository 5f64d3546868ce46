"""Flower app directories: reading their pyproject, and unpacking their bundles safely."""

from __future__ import annotations

import io
import shutil
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.ids import check_token
from fedtide.fabric.plans.tracking import Tracking
from fedtide.fabric.strict import ConfigValues, Scalar
from fedtide.fabric.validation import checked

MAX_BUNDLE_BYTES = 64 * 1024 * 1024
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
_HOW = "See docs/apps.md for what an app directory holds"


@dataclass(frozen=True, slots=True)
class AppDescription:
    """What `pyproject.toml` says of a Flower app."""

    name: str
    serverapp: str
    clientapp: str
    config: ConfigValues
    model: str | None
    export: str | None
    training: str | None
    dependencies: tuple[str, ...]
    track: Tracking | None = None


def describe(directory: Path) -> AppDescription:
    """Read an app directory.

    Raises:
        ConfigError: no such directory, no pyproject, or a field that is missing or wrong.
    """
    if not directory.is_dir():
        raise ConfigError(str(directory), "there is no such app directory", _HOW)
    file = directory / "pyproject.toml"
    if not file.is_file():
        raise ConfigError(str(directory), "the app directory has no pyproject.toml", _HOW)
    try:
        toml = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(str(file), f"not valid TOML: {exc}") from exc
    project, app = _table(file, toml, "project"), _table(file, toml, "tool", "flwr", "app")
    ours, components = _table(file, toml, "tool", "fedtide", "app"), _table(file, app, "components")
    unknown = set(ours) - {"model", "export", "training"}
    if unknown:
        raise ConfigError(
            f"{file}: tool.fedtide.app", f"unknown key {min(unknown)!r}", "Known: model, export, training"
        )
    if bool(ours.get("export")) and not ours.get("model"):
        raise ConfigError(f"{file}: tool.fedtide.app", "`export` is set but `model` is not", _HOW)
    return AppDescription(
        name=str(project.get("name") or directory.resolve().name),
        serverapp=_reference(file, components, "serverapp"),
        clientapp=_reference(file, components, "clientapp"),
        config=flatten(_table(file, app, "config"), f"{file}: tool.flwr.app.config"),
        model=check_token(f"{file}: tool.fedtide.app.model", ours["model"]) if "model" in ours else None,
        export=_reference(file, ours, "export") if "export" in ours else None,
        training=_reference(file, ours, "training") if "training" in ours else None,
        dependencies=tuple(str(d) for d in project.get("dependencies", [])),
        track=_tracking(file, _table(file, toml, "tool", "fedtide", "track")),
    )


def _tracking(file: Path, table: dict[str, Any]) -> Tracking | None:
    return checked(Tracking, table, f"{file}: tool.fedtide.track") if table else None


def _table(file: Path, table: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        table = table.get(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {key}", "must be a table", _HOW)
    return table


def _reference(file: Path, table: dict[str, Any], key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or value.count(":") != 1 or value.startswith(":") or value.endswith(":"):
        raise ConfigError(f"{file}: {key}", "must be a reference such as 'package.module:name'", _HOW)
    return value


def flatten(table: dict[str, Any], path: str, parent: str = "") -> ConfigValues:
    """Nested tables as dotted keys, the way Flower reads a run config."""
    flat: ConfigValues = {}
    for key, value in table.items():
        name = f"{parent}.{key}" if parent else key
        if isinstance(value, dict):
            flat |= flatten(value, path, name)
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        else:
            raise ConfigError(f"{path}.{name}", "must be a string, a number, a boolean or a table of those")
    return flat


def fuse(defaults: ConfigValues, overrides: ConfigValues) -> ConfigValues:
    """The app's config with `overrides`.

    Raises:
        ConfigError: an override that the app does not declare, as in Flower.
    """
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        known = ", ".join(sorted(defaults)) or "none"
        raise ConfigError(f"--set {unknown[0]}", "the app declares no such config key", f"Declared: {known}")
    return {**defaults, **{k: _as_declared(k, defaults[k], v) for k, v in overrides.items()}}


def _as_declared(key: str, declared: Scalar, value: Scalar) -> Scalar:
    if isinstance(declared, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(declared) is not type(value):
        wants_float = isinstance(declared, int) and isinstance(value, float)
        raise ConfigError(
            f"--set {key}",
            f"{value!r} is {type(value).__name__}, the app declares {type(declared).__name__}",
            f"Declare {key} = {declared}.0 in the app's [tool.flwr.app.config]" if wants_float else "",
        )
    return value


def unpack(data: bytes, target: Path) -> None:
    """Unpack a bundle to `target` (which appears whole or not at all).

    Raises:
        MalformedMessage: not a zip, a path that leaves the folder, or too much data.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _extract(data, staging)
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(data: bytes, staging: Path) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(i.file_size for i in archive.infolist()) > MAX_UNPACKED_BYTES:
                raise MalformedMessage("app bundle unpacks to more than is allowed")
            for info in archive.infolist():
                destination = (staging / info.filename).resolve()
                if not destination.is_relative_to(staging.resolve()):
                    raise MalformedMessage(f"app bundle entry {info.filename!r} leaves its folder")
                archive.extract(info, staging)
    except zipfile.BadZipFile as exc:
        raise MalformedMessage("app bundle is not a zip archive") from exc
