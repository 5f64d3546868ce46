"""Fetches a release: from the region's cache, or else from the hub; blobs already on disk are copied."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from fedtide.fabric.errors import NotFound, TransientError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.rate_limit import Pace
from fedtide.fabric.nats.subjects import CACHE, RELEASES, Subjects
from fedtide.fabric.nats.transfer import FileSink, Sink, Source, get_blob, read_blob
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.tensors.blobs import BlobRef, chunked, manifest_of

log = logging.getLogger(__name__)

Local = dict[str, tuple[Path, int]]
"""By digest of a blob: a file on this node, and where in it the blob's bytes begin."""


class ReleaseDownload:
    """One download; `wan_bytes`: bytes fetched from outside the region."""

    def __init__(self, broker: Broker, subjects: Subjects, region: str, bytes_per_s: int | None) -> None:
        pace = Pace(bytes_per_s)
        self._region = region
        self._subjects = subjects
        self._cache = Source(broker, CACHE, domain=broker.streams_of(region), pace=pace)
        self._hub = Source(broker, RELEASES, domain=broker.hub_of(region), pace=pace)
        self.wan_bytes = 0
        self.reused_bytes = 0

    async def manifest(self, release: BlobRef) -> tuple[ReleaseManifest, bytes]:
        """Raises NotFound, DigestMismatch, MalformedMessage, BrokerUnavailable."""
        raw = await self.small(release)
        return decode_release(raw), raw

    async def small(self, ref: BlobRef) -> bytes:
        """A blob of a release that fits into memory. Raises NotFound, DigestMismatch, BrokerUnavailable."""
        try:
            return bytes(await read_blob(self._cache, self._in_cache, ref))
        except NotFound:
            self.wan_bytes += ref.size_bytes
            return bytes(await read_blob(self._hub, self._subjects.release_blob, ref))

    async def files(self, manifest: ReleaseManifest, folder: Path, local: Local) -> None:
        """Fetch the ONNX file and the smoke sample into `folder`; resumes an interrupted download.

        Raises:
            NotFound, DigestMismatch, BrokerUnavailable: as `fedtide.fabric.nats.transfer.get_blob`.
            TransientError: the disk is full.
        """
        await self._file(folder / "model.onnx", manifest.onnx_parts, local)
        await self._file(folder / "smoke.safetensors", [manifest.smoke], local)

    async def _file(self, path: Path, parts: Iterable[BlobRef], local: Local) -> None:
        start = 0
        for ref in parts:
            sink = FileSink(path, start)
            if not self._take_local(ref, sink, local):
                await self._fetch(ref, sink)
            start += ref.size_bytes
        try:
            with path.open("r+b") as file:
                file.truncate(start)
        except OSError as exc:
            raise TransientError(f"cannot store release: {exc.strerror}", "Free disk space on the node") from exc

    async def _fetch(self, ref: BlobRef, sink: Sink) -> None:
        try:
            await get_blob(self._cache, self._in_cache, ref, sink)
        except NotFound:
            log.info("release.not_in_region", extra={"blob": ref.digest[:12]})
            await get_blob(self._hub, self._subjects.release_blob, ref, sink)
            self.wan_bytes += ref.size_bytes

    def _take_local(self, ref: BlobRef, sink: FileSink, local: Local) -> bool:
        """Copy a blob from another release on this disk, if it is there and whole."""
        if ref.digest not in local:
            return False
        path, offset = local[ref.digest]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(ref.size_bytes)
        except OSError:
            return False
        if manifest_of(list(chunked([data]))).ref != ref:
            return False
        sink.write(0, data)
        self.reused_bytes += ref.size_bytes
        return True

    def _in_cache(self, digest: str) -> str:
        return self._subjects.cache_blob(self._region, digest)
