"""Training bundles of apps, made once: exporting takes up to a minute, and its result depends on its inputs alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedtide.fabric.errors import CapabilityMissing, ConfigError, MalformedMessage
from fedtide.fabric.flower import app_files
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.strict import ConfigValues, Scalar
from fedtide.fabric.tensors import training_bundle

_MADE_WITH = ("torch", "onnxscript", "onnxruntime")


class Watched(Mapping[str, Scalar]):
    """A run config that records the keys read: their values are fixed in the graphs, a task must have the same."""

    def __init__(self, config: ConfigValues) -> None:
        self._config = config
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Scalar:
        value = self._config[key]
        self.read.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def cached(directory: Path, config: ConfigValues, export: Callable[[], bytes]) -> Path:
    """The bundle's file for this app and run config; `export` is called if there is none yet."""
    folder = _root() / _key(directory)
    for file in sorted(folder.glob("*.bundle")):
        try:
            fixed = training_bundle.read(file.read_bytes()).manifest.fixed
        except MalformedMessage:
            file.unlink()
            continue
        if all(config.get(key) == value for key, value in fixed.items()):
            return file
    data = export()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(data).hexdigest()}.bundle"
    write_atomically(file, data)
    return file


def planned(
    hook: Callable[[Mapping[str, Scalar]], Any], reference: str, config: ConfigValues
) -> tuple[Any, ConfigValues]:
    """The training plan from the app's hook, and the run config values that it depends on."""
    watched = Watched(config)
    try:
        plan = hook(watched)
    except Exception as exc:  # an app's hook may raise anything
        raise ConfigError(f"training hook {reference}", f"raised {type(exc).__name__}: {exc}") from exc
    return plan, {key: config[key] for key in sorted(watched.read)}


def _root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedtide" / "training"


def _key(directory: Path) -> str:
    try:
        versions = "".join(f"{name} {version(name)}\n" for name in _MADE_WITH)
    except PackageNotFoundError as exc:
        raise CapabilityMissing(
            f"exporting a training step needs {exc.name}, which is not installed here",
            "pip install 'fedtide[aggregator]'",
        ) from exc
    own = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"\0".join((app_files.bundle(directory), versions.encode(), own))).hexdigest()[:32]
