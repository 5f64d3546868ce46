"""Blob transfer over JetStream: windowed, checked chunk by chunk, resumable.

nats-py's object store is not used: it waits for one acknowledgement per 128 KiB, joins chunks
quadratically and cannot read a mirror (docs/decisions/0003-blob-transfer.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from fedtide.fabric.errors import DigestMismatch, NotFound, TransientError
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.rate_limit import Pace
from fedtide.fabric.tensors.blobs import MANIFEST_CHUNK, BlobManifest, BlobRef, chunked, decode_manifest, manifest_of
from fedtide.fabric.tensors.frame import Buffer

WINDOW = 8
"""Chunks in flight at once (8 MiB)."""

Prefix = Callable[[str], str]
"""From a blob's digest to the subject below which its chunks stand."""


class Sink(Protocol):
    """Where checked chunks go."""

    def missing(self, manifest: BlobManifest) -> list[int]: ...
    def write(self, offset: int, data: bytes) -> None: ...


async def put_blob(
    broker: Broker,
    prefix: Prefix,
    stream: str,
    parts: Iterable[Buffer],
    *,
    ttl_s: float | None,
    stored: set[str] | None = None,
) -> BlobRef:
    """Store a blob (once: chunks that are there are not sent again) and return its name.

    If the blob is stored but would expire, and `ttl_s` is None, it is stored again without expiry.

    Args:
        ttl_s: seconds after which the broker may drop it, or None to keep it.
        stored: subjects of it that are known to be stored, kept up to date; None: ask the broker (a permission).

    Raises:
        BrokerUnavailable: the broker went away or is full; call again to go on where it stopped.
    """
    chunks = list(chunked(parts))
    manifest = await asyncio.to_thread(manifest_of, chunks)
    base = prefix(manifest.ref.digest)
    present = await _present(broker, stream, base, ttl_s) if stored is None else frozenset(stored)
    stored = stored if stored is not None else set()
    if f"{base}.{MANIFEST_CHUNK}" in present:
        return manifest.ref
    window = asyncio.Semaphore(WINDOW)

    async def send(index: int) -> None:
        async with window:
            await broker.publish(f"{base}.{index}", bytes(chunks[index]), ttl_s=ttl_s, timeout_s=60)
            stored.add(f"{base}.{index}")

    async with _one_error(), asyncio.TaskGroup() as group:
        for index in range(len(chunks)):
            if f"{base}.{index}" not in present:
                group.create_task(send(index))
    await broker.publish(f"{base}.{MANIFEST_CHUNK}", manifest.encode(), ttl_s=ttl_s)
    stored.add(f"{base}.{MANIFEST_CHUNK}")
    return manifest.ref


async def _present(broker: Broker, stream: str, base: str, ttl_s: float | None) -> frozenset[str]:
    present = await broker.subjects_of(stream, f"{base}.>")
    if present and ttl_s is None and await expires(broker, stream, base):
        return frozenset()
    return present


async def expires(broker: Broker, stream: str, base: str) -> bool:
    """Whether the broker may drop the blob below `base` by itself (or has)."""
    manifest = await broker.last(stream, f"{base}.{MANIFEST_CHUNK}")
    return manifest is None or "Nats-TTL" in manifest.headers


@dataclass(frozen=True, slots=True)
class Source:
    """Where to read from: a stream (of another `domain`), and the domain to fall back to when it lacks a chunk."""

    broker: Broker
    stream: str
    fallback_domain: str | None = None
    domain: str | None = None
    pace: Pace | None = None

    async def read(self, subject: str) -> bytes | None:
        found = await self.broker.last(self.stream, subject, domain=self.domain, timeout_s=60)
        if found is None and self.fallback_domain is not None:
            found = await self.broker.last(self.stream, subject, domain=self.fallback_domain, timeout_s=60)
        if found is not None and self.pace is not None:
            await self.pace.spend(len(found.data))
        return None if found is None else found.data

    async def manifest(self, base: str, ref: BlobRef) -> BlobManifest:
        """The chunk list of the blob below `base`.

        Raises:
            NotFound: there is no such blob (any more).
            DigestMismatch: it is another.
        """
        raw = await self.read(f"{base}.{MANIFEST_CHUNK}")
        if raw is None:
            raise NotFound(f"blob {ref.digest[:12]} is not in the broker", "It may have expired: start the run again")
        return decode_manifest(ref, raw)


async def get_blob(source: Source, prefix: Prefix, ref: BlobRef, sink: Sink) -> None:
    """Fetch what `sink` lacks of a blob; every chunk is checked before the sink sees it.

    Raises:
        NotFound: the broker has no such blob (any more).
        DigestMismatch: a chunk was tampered with; the sink has only good chunks.
        BrokerUnavailable: call again to go on where it stopped.
    """
    base = prefix(ref.digest)
    manifest = await source.manifest(base, ref)
    window = asyncio.Semaphore(WINDOW)

    async def fetch(index: int) -> None:
        async with window:
            sink.write(index * manifest.chunk_bytes, await _chunk(source, base, manifest, index))

    async with _one_error(), asyncio.TaskGroup() as group:
        for index in sink.missing(manifest):
            group.create_task(fetch(index))


async def stream_blob(
    source: Source, prefix: Prefix, ref: BlobRef, from_byte: int = 0, *, chunks: Sequence[int] | None = None
) -> AsyncIterator[bytes]:
    """The checked chunks of a blob in order; the next ones are fetched while one is being used.

    Args:
        from_byte: where a chunk begins.
        chunks: only those of these numbers.

    Raises:
        NotFound, DigestMismatch, BrokerUnavailable: as `get_blob`; what was yielded is good.
    """
    base = prefix(ref.digest)
    manifest = await source.manifest(base, ref)
    ahead: deque[asyncio.Task[bytes]] = deque()
    rest = iter(range(from_byte // manifest.chunk_bytes, len(manifest.chunks)) if chunks is None else list(chunks))
    try:
        for index in islice(rest, WINDOW):
            ahead.append(asyncio.create_task(_chunk(source, base, manifest, index)))
        while ahead:
            chunk = await ahead[0]
            ahead.popleft()
            for index in islice(rest, 1):
                ahead.append(asyncio.create_task(_chunk(source, base, manifest, index)))
            yield chunk
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


async def _chunk(source: Source, base: str, manifest: BlobManifest, index: int) -> bytes:
    data = await source.read(f"{base}.{index}")
    if data is None:
        raise NotFound(f"chunk {index} of blob {manifest.ref.digest[:12]} is not in the broker")
    await asyncio.to_thread(manifest.check, index, data)
    return data


class MemorySink:
    """Collects a blob in memory: `data` is whole once `get_blob` returned."""

    def __init__(self, ref: BlobRef) -> None:
        self.data = bytearray(ref.size_bytes)

    def missing(self, manifest: BlobManifest) -> list[int]:
        return list(range(len(manifest.chunks)))

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data


class FileSink:
    """Collects a blob in a file, from byte `start` on; chunks of an interrupted transfer are known by their digest."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path = path
        self._start = start

    def missing(self, manifest: BlobManifest) -> list[int]:
        try:
            if not self.path.exists():
                self.path.touch()
                return list(range(len(manifest.chunks)))
        except OSError as exc:
            raise _cannot_write(self.path, exc) from exc
        wanted = []
        with self.path.open("rb") as file:
            for index in range(len(manifest.chunks)):
                file.seek(self._start + index * manifest.chunk_bytes)
                try:
                    manifest.check(index, file.read(manifest.chunk_size(index)))
                except DigestMismatch:
                    wanted.append(index)
        return wanted

    def write(self, offset: int, data: bytes) -> None:
        try:
            self.path.touch()
            with self.path.open("r+b") as file:
                file.seek(self._start + offset)
                file.write(data)
        except OSError as exc:
            raise _cannot_write(self.path, exc) from exc


def _cannot_write(path: Path, error: OSError) -> TransientError:
    return TransientError(f"cannot write {path.name}: {error.strerror}", "Free disk space; it resumes")


async def read_blob(source: Source, prefix: Prefix, ref: BlobRef) -> bytearray:
    """A whole blob in memory."""
    sink = MemorySink(ref)
    await get_blob(source, prefix, ref, sink)
    return sink.data


@asynccontextmanager
async def _one_error() -> AsyncIterator[None]:
    """A failed window raises its first error as itself, not as a group of equal ones."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
