"""Releases on a node's disk: fetched whole, verified, then made current by one rename.

    releases/<digest>/            manifest.json, model.onnx, smoke.safetensors
    releases/<digest>.part/       a download that may be resumed
    current/<model>.json          what is served: counter, release, and the last-known-good before it

Losing power at any point leaves the old or the new release current, whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from fabric.blobs import BlobRef, chunked, manifest_of
from fabric.broker import Broker
from fabric.errors import DigestMismatch, MalformedMessage, TransientError
from fabric.release import ReleaseManifest
from fabric.streams import HUB_DOMAIN
from fabric.subjects import DOWN, Subjects
from fabric.transfer import FileSink, Source, get_blob, read_blob
from fabric.wire import Strict


class Current(Strict):
    """What one model serves. `counter` is the highest desired state seen, also when it failed."""

    model: str
    counter: int
    rollout: str
    release: BlobRef | None
    previous: BlobRef | None = None


class ModelStore:
    """Owns its folder. Reads need no network; `fetch` is the only part that does."""

    def __init__(self, root: Path) -> None:
        self._releases = root / "releases"
        self._current = root / "current"
        for folder in (self._releases, self._current):
            folder.mkdir(parents=True, exist_ok=True)

    def current(self) -> list[Current]:
        """What every model on this node should serve, read from disk."""
        return [Current.model_validate_json(p.read_bytes()) for p in sorted(self._current.glob("*.json"))]

    def current_of(self, model: str) -> Current | None:
        path = self._current / f"{model}.json"
        return Current.model_validate_json(path.read_bytes()) if path.exists() else None

    def set_current(self, current: Current) -> None:
        """Durable and atomic: fsync, rename, fsync of the folder."""
        path = self._current / f"{current.model}.json"
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(current.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync(self._current)

    def folder(self, release: BlobRef) -> Path:
        return self._releases / release.digest

    def manifest(self, release: BlobRef) -> ReleaseManifest:
        """Raises MalformedMessage if the release is not here or its manifest is damaged."""
        try:
            raw = (self.folder(release) / "manifest.json").read_bytes()
            return ReleaseManifest.model_validate_json(raw)
        except (OSError, ValidationError) as exc:
            raise MalformedMessage(f"release {release.digest[:12]} is not whole on this node") from exc

    async def fetch(self, broker: Broker, subjects: Subjects, release: BlobRef) -> Path:
        """Bring a release's files to a staging folder, every chunk checked; resumes what is there.

        Raises:
            NotFound, DigestMismatch, BrokerUnavailable: as `fabric.transfer.get_blob`.
            MalformedMessage: the manifest is not one.
            TransientError: no room on the disk.
        """
        if self.folder(release).exists():
            return self.folder(release)
        source = Source(broker, DOWN, fallback_domain=HUB_DOMAIN)
        raw = bytes(await read_blob(source, subjects.blob, release))
        try:
            manifest = ReleaseManifest.model_validate_json(raw)
        except ValidationError as exc:
            raise MalformedMessage(f"release {release.digest[:12]}: {exc.errors()[0]['msg']}") from exc
        staging = self._releases / f"{release.digest}.part"
        try:
            staging.mkdir(exist_ok=True)
            (staging / "manifest.json").write_bytes(raw)
        except OSError as exc:
            raise TransientError(f"cannot store release: {exc.strerror}", "Free disk space on the node") from exc
        for ref, name in ((manifest.onnx, "model.onnx"), (manifest.smoke, "smoke.safetensors")):
            path = staging / name
            await get_blob(source, subjects.blob, ref, FileSink(path))
            with path.open("r+b") as file:
                file.truncate(ref.size_bytes)
        return staging

    def stage(self, release: BlobRef, staging: Path) -> None:
        """Check the files once more as they are on disk, and give them their final name.

        Raises:
            DigestMismatch: the disk does not hold what was fetched.
        """
        target = self.folder(release)
        if staging == target:
            return
        manifest = ReleaseManifest.model_validate_json((staging / "manifest.json").read_bytes())
        for ref, name in ((manifest.onnx, "model.onnx"), (manifest.smoke, "smoke.safetensors")):
            found = manifest_of(list(chunked([(staging / name).read_bytes()]))).ref
            if found != ref:
                raise DigestMismatch(f"{name} of release {release.digest[:12]} does not match its digest")
            _sync(staging / name)
        staging.rename(target)
        _sync(self._releases)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
