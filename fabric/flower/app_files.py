"""Which files of an app directory travel, by Flower's rules, and their bundle.

Flower's `fab-include`, `fab-exclude`, `.gitignore` and built-in exclusions hold (flwr 1.41, `flwr build`). Files of
other kinds than text travel too: an app may bring weights and tables. What stays behind is told, with the reason.

A bundle is a deterministic zip: the same files give the same bytes, so the same digest.
"""

from __future__ import annotations

import io
import os
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathspec import PathSpec

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.flower.apps import MAX_BUNDLE_BYTES, MAX_UNPACKED_BYTES
from fedtide.fabric.tensors.training_bundle import TRAINING

_EPOCH = (1980, 1, 1, 0, 0, 0)
_NEVER_TOLD = frozenset({"__pycache__", ".git", ".flwr", "node_modules", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
_EXCLUDED = (
    *("**/*_test.py", "**/test_*.py", "*.egg", "*.egg-info", "*.pyc", "*.pyo", "*.fab"),
    *(f"{name}/**" for name in ("build", "dist", "eggs", ".eggs", "lib", "lib64", "parts")),
    *(f"{name}/**" for name in (".venv", "env", "venv", "ENV", "env.bak", "venv.bak")),
)
_HIDDEN_THAT_TRAVEL = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
"""Kinds that Flower sends also if they are hidden; other hidden files may hold secrets."""
_NARROW = "Narrow it with fab-exclude in [tool.flwr.app], or with .gitignore"


Spec = PathSpec[Any]


@dataclass
class AppFiles:
    """`files` by name in the bundle; `left_out`: what stays behind, with the reason."""

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rules:
    """`excluding`: what stays behind, with the reason; `include`: all that travels (None: everything else)."""

    excluding: tuple[tuple[Spec, str], ...]
    include: Spec | None

    def why_not_below(self, folder: str) -> str | None:
        """Why nothing below a folder travels; rules with exceptions are asked file by file."""
        for spec, why in self.excluding:
            if all(p.include is not False for p in spec.patterns) and spec.match_file(f"{folder}/x"):
                return why
        return None

    def why_not(self, name: str) -> str | None:
        """Why a file stays behind, or None."""
        for spec, why in self.excluding:
            if spec.match_file(name):
                return why
        last = Path(name)
        if last.name.startswith(".") and last.suffix not in _HIDDEN_THAT_TRAVEL:
            return "hidden"
        if self.include is not None and name != "pyproject.toml" and not self.include.match_file(name):
            return "not in fab-include"
        return None


def app_files(directory: Path) -> AppFiles:
    """What of an app directory travels.

    Raises:
        ConfigError: rules that cannot be read, or files of more than MAX_UNPACKED_BYTES.
    """
    found, rules = AppFiles(), _rules(directory)
    for root, folders, names in os.walk(directory):
        at = Path(root).relative_to(directory)
        folders[:] = [
            name for name in sorted(folders) if _enters(found, rules, Path(root, name), (at / name).as_posix())
        ]
        for file in sorted(names):
            name, path = (at / file).as_posix(), Path(root, file)
            why = "a link" if path.is_symlink() else rules.why_not(name)
            if why is None:
                found.files[name] = path
            elif not file.endswith((".pyc", ".pyo")) and file != ".gitignore":
                found.left_out[name] = why
    _check_sizes(directory, found)
    return found


def _enters(found: AppFiles, rules: _Rules, folder: Path, name: str) -> bool:
    if folder.name in _NEVER_TOLD:
        return False
    why = "a link" if folder.is_symlink() else rules.why_not_below(name)
    if why is not None:
        found.left_out[f"{name}/"] = why
    return why is None


def _rules(directory: Path) -> _Rules:
    file = directory / "pyproject.toml"
    try:
        app = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {}).get("flwr", {}).get("app", {})
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(str(file), f"cannot be read: {exc}") from exc
    include, exclude = (
        _patterns(f"{file}: tool.flwr.app.{key}", app.get(key)) for key in ("fab-include", "fab-exclude")
    )
    ignored = _spec(directory / ".gitignore", _lines(directory / ".gitignore"))
    built_in = (_spec(directory, _EXCLUDED), "as in Flower")
    own = [(exclude, "fab-exclude")] if exclude is not None else []
    return _Rules(((ignored, ".gitignore"), *own, built_in), include)


def _patterns(where: str, patterns: object) -> Spec | None:
    if patterns is None:
        return None
    if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(where, "must be a list of patterns, as in .gitignore")
    return _spec(where, patterns)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(str(file), f"cannot be read: {exc}") from exc


def _spec(where: object, patterns: Iterable[str]) -> Spec:
    try:
        return PathSpec.from_lines("gitignore", patterns)
    except ValueError as exc:
        raise ConfigError(str(where), f"holds a pattern that cannot be read: {exc}") from exc


def _check_sizes(directory: Path, found: AppFiles) -> None:
    """Before anything is read: what is too large on the nodes too cannot be sent."""
    sizes = {name: path.stat().st_size for name, path in found.files.items()}
    if sum(sizes.values()) > MAX_UNPACKED_BYTES:
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in largest)
        raise ConfigError(
            str(directory),
            f"its files have {sum(sizes.values()) / 1e6:.0f} MB, more than {MAX_UNPACKED_BYTES // 2**20} MiB: {named}",
            _NARROW,
        )


def bundle(directory: Path, more: Mapping[str, bytes] | None = None) -> bytes:
    """The app directory as a deterministic zip.

    Args:
        more: further files, which take the place of those of the directory.

    Raises:
        ConfigError: as `app_files`; also if it is larger than MAX_BUNDLE_BYTES.
    """
    own: dict[str, Path | bytes] = dict(app_files(directory).files)
    own.pop(TRAINING, None)  # one in the directory may be of an older app
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, source in sorted((own | dict(more or {})).items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, source.read_bytes() if isinstance(source, Path) else source)
            if buffer.tell() > MAX_BUNDLE_BYTES:
                raise ConfigError(str(directory), f"its bundle has more than {MAX_BUNDLE_BYTES // 2**20} MiB", _NARROW)
    return buffer.getvalue()
