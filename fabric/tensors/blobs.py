"""Content addressing: how bytes become chunks, a manifest and a digest.

A blob's digest is the SHA-256 of its manifest; the manifest names the size and the SHA-256 of
every chunk. So each chunk is checked on its own before a byte of it is used, and a broken
transfer resumes at the missing chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from fedtide.fabric.errors import DigestMismatch, MalformedMessage
from fedtide.fabric.tensors.frame import Buffer

CHUNK_BYTES = 1024 * 1024
MANIFEST_CHUNK = "m"


class BlobRef(BaseModel):
    """Names a blob: what travels in messages instead of the bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


@dataclass(frozen=True, slots=True)
class BlobManifest:
    """The chunk list of one blob. `chunks[i]` is the SHA-256 of bytes [i * chunk_bytes, ...)."""

    size_bytes: int
    chunk_bytes: int
    chunks: tuple[str, ...]

    def encode(self) -> bytes:
        return json.dumps(
            {"size": self.size_bytes, "chunk": self.chunk_bytes, "chunks": self.chunks}, separators=(",", ":")
        ).encode()

    @property
    def ref(self) -> BlobRef:
        return BlobRef(digest=hashlib.sha256(self.encode()).hexdigest(), size_bytes=self.size_bytes)

    def chunk_size(self, index: int) -> int:
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def check(self, index: int, data: Buffer) -> None:
        """Raises DigestMismatch unless `data` is chunk `index`."""
        if len(data) != self.chunk_size(index) or hashlib.sha256(data).hexdigest() != self.chunks[index]:
            raise DigestMismatch(f"chunk {index} does not match its digest")


def decode_manifest(ref: BlobRef, data: bytes) -> BlobManifest:
    """The manifest that `ref` names.

    Raises:
        DigestMismatch: `data` is another manifest.
        MalformedMessage: it is the right one, but not valid.
    """
    if hashlib.sha256(data).hexdigest() != ref.digest:
        raise DigestMismatch(f"manifest of blob {ref.digest[:12]} does not match its digest")
    try:
        raw = json.loads(data)
        manifest = BlobManifest(int(raw["size"]), int(raw["chunk"]), tuple(str(c) for c in raw["chunks"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise MalformedMessage(f"manifest of blob {ref.digest[:12]} does not parse") from exc
    expected = -(-manifest.size_bytes // manifest.chunk_bytes) if manifest.chunk_bytes > 0 else -1
    if manifest.size_bytes != ref.size_bytes or len(manifest.chunks) != expected:
        raise MalformedMessage(f"manifest of blob {ref.digest[:12]} contradicts itself")
    return manifest


def chunked(parts: Iterable[Buffer], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Buffer]:
    """Regroup buffers into chunks of `chunk_bytes` (the last one shorter); copies only across seams."""
    pending: list[memoryview] = []
    have = 0
    for part in parts:
        if not len(part):
            continue
        view = memoryview(part).cast("B")
        while len(view):
            take = min(len(view), chunk_bytes - have)
            pending.append(view[:take])
            have += take
            view = view[take:]
            if have == chunk_bytes:
                yield pending[0] if len(pending) == 1 else b"".join(pending)
                pending, have = [], 0
    if have:
        yield pending[0] if len(pending) == 1 else b"".join(pending)


def manifest_of(chunks: Sequence[Buffer], chunk_bytes: int = CHUNK_BYTES) -> BlobManifest:
    """The manifest of a blob that was cut by `chunked`."""
    return BlobManifest(sum(len(c) for c in chunks), chunk_bytes, tuple(hashlib.sha256(c).hexdigest() for c in chunks))
