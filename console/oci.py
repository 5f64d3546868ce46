"""Releases in OCI registries (https://github.com/opencontainers/image-spec): a copy's files are layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedtide.console.verifying import FILES
from fedtide.fabric.errors import CapabilityMissing, ConfigError, TransientError

TYPE = "application/vnd.fedtide.release.v1"


def push(reference: str, folder: Path, *, plain_http: bool) -> None:
    """Raises CapabilityMissing: the library is missing; ConfigError, TransientError: the registry does not take it."""
    client = _client(plain_http=plain_http)
    files = [f"{folder / name}:{TYPE}.{name.replace('.', '-')}" for name in FILES]
    _done(reference, lambda: client.push(target=reference, files=files, disable_path_validation=True))


def pull(reference: str, folder: Path, *, plain_http: bool) -> None:
    """Into a folder; raises as `push`."""
    client = _client(plain_http=plain_http)
    with TemporaryDirectory() as scratch:  # a registry keeps the path that it was pushed from
        _done(reference, lambda: client.pull(target=reference, outdir=scratch, overwrite=True))
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            for found in Path(scratch).rglob(name):
                shutil.copyfile(found, folder / name)


def _client(*, plain_http: bool) -> Any:
    try:
        from oras.client import OrasClient
    except ImportError as exc:
        raise CapabilityMissing("registries need a library", "pip install 'fedtide[oci]'") from exc
    return OrasClient(insecure=plain_http)


def _done(reference: str, work: Any) -> None:
    try:
        work()
    except ValueError as exc:
        raise ConfigError("--oci", f"{reference}: {exc}", "HOST/NAME:TAG; log in with `docker login`") from exc
    except Exception as exc:  # of requests, and of whatever the library raises
        raise TransientError(f"the registry of {reference} does not take part: {exc}") from exc
