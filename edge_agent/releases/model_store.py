"""Releases on a node's disk: fetched whole, verified, then made current by one rename.

    releases/<digest>/            manifest.json, attestation.json, model.onnx, smoke.safetensors
    releases/<digest>.part/       a download that may be resumed
    current/<model>.json          what is served: counter, release, and the last-known-good before it

Losing power at any point leaves the old or the new release current, whole.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from fedtide.edge_agent.releases.download import Local, ReleaseDownload
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import DigestMismatch, MalformedMessage, TransientError
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.process.files import map_file, sync, write_atomically
from fedtide.fabric.strict import Strict
from fedtide.fabric.tensors.blobs import BlobRef, chunked, manifest_of

log = logging.getLogger(__name__)


class Current(Strict):
    """The release that one model serves; `order`: the highest of a desired state that was seen, even if it failed."""

    model: str
    counter: int
    rollout: str
    release: BlobRef | None
    previous: BlobRef | None = None
    generation: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.generation, self.counter


class ModelStore:
    """Owns its folder. Reads need no network; `fetch` is the only part that does."""

    def __init__(self, root: Path) -> None:
        self._releases = root / "releases"
        self._current = root / "current"
        for folder in (self._releases, self._current):
            folder.mkdir(parents=True, exist_ok=True)

    def current(self) -> list[Current]:
        """What every model on this node should serve, read from disk."""
        models = [self.current_of(path.stem) for path in sorted(self._current.glob("*.json"))]
        return [current for current in models if current is not None]

    def current_of(self, model: str) -> Current | None:
        """None: missing or unreadable; the node then waits for the desired state from the roll-outs."""
        path = self._current / f"{model}.json"
        try:
            return from_json(Current, path.read_bytes(), path.name) if path.exists() else None
        except (OSError, MalformedMessage) as exc:
            log.error("release.current_unreadable", extra={"model": model, "reason": str(exc)})
            return None

    def set_current(self, current: Current) -> None:
        """Durable and atomic."""
        write_atomically(self._current / f"{current.model}.json", to_json(current))

    def folder(self, release: BlobRef) -> Path:
        return self._releases / release.digest

    def has(self, release: BlobRef) -> bool:
        return self.folder(release).exists()

    def has_begun(self, release: BlobRef) -> bool:
        """Whether some of it was fetched."""
        return self.has(release) or self._part(release).exists()

    def _part(self, release: BlobRef) -> Path:
        return self._releases / f"{release.digest}.part"

    def manifest(self, release: BlobRef) -> ReleaseManifest:
        """Raises MalformedMessage if the release is not here or its manifest is damaged."""
        try:
            return decode_release((self.folder(release) / "manifest.json").read_bytes())
        except OSError as exc:
            raise MalformedMessage(f"release {release.digest[:12]} is not whole on this node") from exc

    async def fetch(
        self, download: ReleaseDownload, model: str, release: BlobRef, vouched: Callable[[bytes], Awaitable[bytes]]
    ) -> Path:
        """Fetch a release's files into a staging folder, checking every chunk; resumes a partial download.

        Args:
            vouched: checks who vouches for a manifest, and gives what they have signed; it raises if nobody does.

        Raises:
            NotFound, DigestMismatch, BrokerUnavailable: as `fedtide.fabric.nats.transfer.get_blob`.
            MalformedMessage: the manifest is invalid, or is that of another model.
            TransientError: no room on the disk.
        """
        if self.has(release):
            try:
                self.check(release)
                await vouched((self.folder(release) / "manifest.json").read_bytes())
                return self.folder(release)
            except (DigestMismatch, MalformedMessage) as exc:
                log.warning("release.damaged", extra={"release": release.digest, "reason": str(exc)})
        manifest, raw = await download.manifest(release)
        if manifest.model != model:
            raise MalformedMessage(f"release {release.digest[:12]} is of model {manifest.model!r}, not {model!r}")
        attestation, staging = await vouched(raw), self._part(release)
        try:
            staging.mkdir(exist_ok=True)
            (staging / "manifest.json").write_bytes(raw)
            (staging / "attestation.json").write_bytes(attestation)
        except OSError as exc:
            raise TransientError(f"cannot store release: {exc.strerror}", "Free disk space on the node") from exc
        await download.files(manifest, staging, self._local())
        return staging

    def _local(self) -> Local:
        """The files on this disk that hold the blobs of releases."""
        found: Local = {}
        for folder in self._releases.iterdir():
            try:
                manifest = decode_release((folder / "manifest.json").read_bytes())
            except (OSError, MalformedMessage):
                continue
            if folder.suffix != ".part":
                start = 0
                for ref in manifest.onnx_parts:
                    found[ref.digest] = (folder / "model.onnx", start)
                    start += ref.size_bytes
                found[manifest.smoke.digest] = (folder / "smoke.safetensors", 0)
        return found

    def stage(self, release: BlobRef, staging: Path) -> None:
        """Check the files once more as they are on disk, and give them their final name.

        Raises:
            DigestMismatch: the disk does not hold what was fetched.
        """
        target = self.folder(release)
        if staging == target:
            return
        for path in _checked_files(release, staging):
            sync(path)
        for name in ("manifest.json", "attestation.json"):
            sync(staging / name)
        sync(staging)
        staging.rename(target)
        sync(self._releases)

    def check(self, release: BlobRef) -> None:
        """Read a release on this disk as a whole.

        Raises:
            DigestMismatch, MalformedMessage: it is damaged; it is deleted, so that it is fetched again.
        """
        try:
            manifest_bytes = (self.folder(release) / "manifest.json").read_bytes()
            if manifest_of(list(chunked([manifest_bytes]))).ref != release:
                raise DigestMismatch(f"the manifest of release {release.digest[:12]} does not match its digest")
            _checked_files(release, self.folder(release))
        except (OSError, DigestMismatch, MalformedMessage) as exc:
            self.discard(release)
            if isinstance(exc, OSError):
                raise MalformedMessage(f"release {release.digest[:12]} is not whole on this node") from exc
            raise

    def discard(self, release: BlobRef) -> None:
        """Delete a release that turned out unusable: asked for again, it is fetched anew."""
        for folder in (self.folder(release), self._part(release)):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, wanted: Iterable[BlobRef] = ()) -> None:
        """Delete releases that are neither active nor last-known-good of any model, nor `wanted`."""
        kept = {ref.digest for ref in wanted}
        for current in self.current():
            kept |= {ref.digest for ref in (current.release, current.previous) if ref is not None}
        for folder in self._releases.iterdir():
            if folder.name.removesuffix(".part") not in kept:
                log.info("release.swept", extra={"release": folder.name[:12]})
                shutil.rmtree(folder, ignore_errors=True)


def _checked_files(release: BlobRef, folder: Path) -> list[Path]:
    """The files of a release, after reading them.

    Raises:
        DigestMismatch: the disk does not hold what was fetched; what is wrong is deleted.
    """
    manifest = decode_release((folder / "manifest.json").read_bytes())
    files = []
    for ref, name in ((manifest.onnx, "model.onnx"), (manifest.smoke, "smoke.safetensors")):
        path = folder / name
        found = manifest_of(list(chunked([map_file(path)] if path.stat().st_size else []))).ref
        if found != ref:
            path.unlink()
            raise DigestMismatch(f"{name} of release {release.digest[:12]} does not match its digest")
        files.append(path)
    return files
