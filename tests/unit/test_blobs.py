"""Chunks, manifests and digests."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtide.fabric.errors import DigestMismatch, MalformedMessage
from fedtide.fabric.tensors.blobs import BlobRef, chunked, decode_manifest, manifest_of


@given(st.lists(st.binary(max_size=40), max_size=10), st.integers(1, 17))
def test_chunking_loses_and_reorders_nothing(parts: list[bytes], size: int) -> None:
    chunks = [bytes(c) for c in chunked(parts, size)]
    assert b"".join(chunks) == b"".join(parts)
    assert all(len(c) == size for c in chunks[:-1])


def test_equal_bytes_have_equal_digests_however_they_are_cut_into_parts() -> None:
    whole = manifest_of(list(chunked([b"abcdef"], 4)), 4)
    pieces = manifest_of(list(chunked([b"a", b"", b"bcde", b"f"], 4)), 4)
    assert whole == pieces


def test_a_tampered_chunk_is_recognised() -> None:
    manifest = manifest_of([b"aaaa", b"bb"], 4)
    manifest.check(0, b"aaaa")
    for wrong in (b"aaab", b"aaa", b"aaaaa"):
        with pytest.raises(DigestMismatch):
            manifest.check(0, wrong)


def test_a_manifest_is_bound_to_its_digest_and_its_own_sizes() -> None:
    manifest = manifest_of([b"aaaa", b"bb"], 4)
    raw = manifest.encode()
    assert decode_manifest(manifest.ref, raw) == manifest
    with pytest.raises(DigestMismatch):
        decode_manifest(manifest.ref, raw + b" ")
    lying = raw.replace(b'"size":6', b'"size":9')
    with pytest.raises(MalformedMessage, match="contradicts"):
        decode_manifest(BlobRef(digest=hashlib.sha256(lying).hexdigest(), size_bytes=6), lying)


def test_an_empty_blob_has_no_chunks() -> None:
    manifest = manifest_of(list(chunked([b""])))
    assert manifest.chunks == ()
    assert decode_manifest(manifest.ref, manifest.encode()) == manifest
