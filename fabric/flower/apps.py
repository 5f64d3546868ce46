"""Flower app directories: reading their pyproject, bundling them, unpacking them safely.

A bundle is a deterministic zip: the same files give the same bytes, so the same digest.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtide.fabric.errors import ConfigError, MalformedMessage
from fedtide.fabric.ids import check_token
from fedtide.fabric.strict import ConfigValues, Scalar
from fedtide.fabric.tensors.training_bundle import TRAINING

MAX_BUNDLE_BYTES = 64 * 1024 * 1024
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SKIPPED_DIRS = {"__pycache__", "node_modules", "build", "dist", "venv"}
_SKIPPED_SUFFIXES = {".pyc", ".pyo", ".pt", ".fab"}
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
    )


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
        raise ConfigError(
            f"--set {key}", f"{value!r} is {type(value).__name__}, the app declares {type(declared).__name__}"
        )
    return value


def bundle(directory: Path, more: Mapping[str, bytes] | None = None) -> bytes:
    """The app directory as a deterministic zip, without caches, environments and hidden files.

    Args:
        more: further files, which take the place of those of the directory.

    Raises:
        ConfigError: larger than MAX_BUNDLE_BYTES.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        own = {path.relative_to(directory).as_posix(): path.read_bytes() for path in _files(directory)}
        own.pop(TRAINING, None)  # one in the directory may be of an older app
        for name, data in sorted({**own, **(more or {})}.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    if buffer.tell() > MAX_BUNDLE_BYTES:
        raise ConfigError(
            str(directory),
            f"the app bundle has {buffer.tell()} bytes, more than {MAX_BUNDLE_BYTES}",
            "Keep data and models out of the app directory",
        )
    return buffer.getvalue()


def _files(directory: Path) -> list[Path]:
    found: list[Path] = []
    for root, dirs, names in os.walk(directory):
        dirs[:] = [d for d in dirs if not d.startswith(".") and d not in _SKIPPED_DIRS and not d.endswith(".egg-info")]
        found += [Path(root, n) for n in names if not n.startswith(".") and Path(n).suffix not in _SKIPPED_SUFFIXES]
    return sorted(p for p in found if p.is_file() and not p.is_symlink())


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
