"""Releases in pieces, and on a node's disk: whole or not at all."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fedtide.aggregation.release.onnx_parts import MIN_TENSOR_BYTES, cut
from fedtide.edge_agent.releases.download import ReleaseDownload
from fedtide.edge_agent.releases.model_store import Current, ModelStore
from fedtide.fabric.errors import DigestMismatch, MalformedMessage, NotFound
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.streams import hub_streams, leaf_streams
from fedtide.fabric.nats.subjects import CACHE, RELEASES, Subjects
from fedtide.fabric.nats.transfer import put_blob
from fedtide.fabric.plans.release import ReleaseManifest, decode_release
from fedtide.fabric.tensors.blobs import BlobRef, chunked
from tests.integration.releases import smoke
from tests.served import manifest, ref_of
from tests.shell.fake_broker import FakeNats

SUBJECTS = Subjects()


def two_layers(first: int, second: int, side: int = 80) -> bytes:
    """x @ W1 @ W2, each matrix `side` squared and filled with its own number."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", side])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", side])
    weights = [
        numpy_helper.from_array(np.full((side, side), value, np.float32), name)
        for name, value in (("w1", first), ("w2", second))
    ]
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])]
    body = helper.make_graph(nodes, "two", [x], [y], weights)
    return bytes(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.sampled_from([10, 64, 80]))
def test_the_pieces_are_the_file_and_only_changed_tensors_are_others(a: int, b: int, side: int) -> None:
    one, other = two_layers(a, 1, side), two_layers(b, 1, side)
    assert b"".join(cut(one)) == one
    pieces, others = ([ref_of(bytes(p)) for p in cut(f)] for f in (one, other))
    large = side * side * 4 >= MIN_TENSOR_BYTES
    assert len(pieces) == (5 if large else 1)
    if large:
        assert sum(p != q for p, q in zip(pieces, others, strict=True)) == (a != b)


def test_what_is_no_onnx_file_is_one_piece() -> None:
    assert cut(b"\xff\xffnonsense") == [b"\xff\xffnonsense"]
    assert onnx.ModelProto.FromString(b"".join(cut(two_layers(1, 2)))).graph.name == "two"


class Region:
    """A broker with the streams of hub and region, and releases put into it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    async def release(self, content: bytes, version: int, *, into: str = CACHE, **changes: Any) -> BlobRef:
        sample = b"".join(smoke(1.0))
        wanted = manifest(version, content, sample, parts=[ref_of(bytes(p)) for p in cut(content)])
        raw = (
            wanted.model_copy(update=changes).model_dump_json().encode()
            if changes
            else wanted.model_dump_json().encode()
        )
        prefix = (lambda d: SUBJECTS.cache_blob("eu", d)) if into == CACHE else SUBJECTS.release_blob
        for part in [*cut(content), sample, raw]:
            await put_blob(self.broker, prefix, into, [part], ttl_s=None)
        return ref_of(raw)

    def download(self) -> ReleaseDownload:
        return ReleaseDownload(self.broker, SUBJECTS, "eu", None)


@pytest.fixture
async def region() -> AsyncIterator[Region]:
    broker = FakeNats().connect()
    for config in (*hub_streams(SUBJECTS), *leaf_streams(SUBJECTS, "eu")):
        if config["name"] in (RELEASES, CACHE):
            await broker.ensure_stream(config)
    yield Region(broker)
    await broker.close()


async def unsigned(_: bytes) -> bytes:
    """Where nothing is signed."""
    return b""


async def test_of_a_release_with_the_same_graph_only_the_changed_tensor_is_fetched(
    region: Region, tmp_path: Path
) -> None:
    store = ModelStore(tmp_path)
    first, second = await region.release(two_layers(1, 2), 1), await region.release(two_layers(1, 3), 2)
    store.stage(first, await store.fetch(region.download(), "scale", first, unsigned))
    download = region.download()
    store.stage(second, await store.fetch(download, "scale", second, unsigned))
    assert (store.folder(second) / "model.onnx").read_bytes() == two_layers(1, 3)
    assert download.reused_bytes > len(two_layers(1, 3)) - 80 * 80 * 4
    assert download.wan_bytes == 0


async def test_what_the_region_lacks_comes_from_the_hub_and_is_counted(region: Region, tmp_path: Path) -> None:
    store, content = ModelStore(tmp_path), two_layers(1, 2)
    ref = await region.release(content, 1, into=RELEASES)
    download = region.download()
    # The hub's domain: here it is the same server, whose domain is `hub`.
    await store.fetch(download, "scale", ref, unsigned)
    assert download.wan_bytes >= len(content)


async def test_a_tampered_chunk_is_refused_and_nothing_is_staged(region: Region, tmp_path: Path) -> None:
    content = two_layers(1, 2)
    ref = await region.release(content, 1)
    big = ref_of(bytes(cut(content)[1]))
    await region.broker.publish(f"{SUBJECTS.cache_blob('eu', big.digest)}.0", b"x" * big.size_bytes)
    store = ModelStore(tmp_path)
    with pytest.raises(DigestMismatch):
        await store.fetch(region.download(), "scale", ref, unsigned)
    assert not store.has(ref)


async def test_a_release_that_is_nowhere_is_not_found(region: Region, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await ModelStore(tmp_path).fetch(region.download(), "scale", ref_of(b"nothing"), unsigned)


async def test_a_file_that_changed_on_the_disk_is_not_staged_and_fetched_anew(region: Region, tmp_path: Path) -> None:
    store, content = ModelStore(tmp_path), two_layers(1, 2)
    ref = await region.release(content, 1)
    staging = await store.fetch(region.download(), "scale", ref, unsigned)
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    (staging / "model.onnx").write_bytes(bytes(damaged))
    with pytest.raises(DigestMismatch, match=r"model\.onnx"):
        store.stage(ref, staging)
    store.stage(ref, await store.fetch(region.download(), "scale", ref, unsigned))
    assert (store.folder(ref) / "model.onnx").read_bytes() == content


async def test_an_interrupted_download_goes_on_where_it_was(region: Region, tmp_path: Path) -> None:
    store, content = ModelStore(tmp_path), two_layers(1, 2)
    ref = await region.release(content, 1)
    staging = await store.fetch(region.download(), "scale", ref, unsigned)
    for part in cut(content)[:3]:  # what is there already is gone from the region
        await region.broker.purge(CACHE, f"{SUBJECTS.cache_blob('eu', ref_of(bytes(part)).digest)}.0")
    store.stage(ref, await store.fetch(region.download(), "scale", ref, unsigned))
    assert not staging.exists()


async def test_a_release_of_another_model_is_refused(region: Region, tmp_path: Path) -> None:
    ref = await region.release(two_layers(1, 2), 1)
    with pytest.raises(MalformedMessage, match="is of model 'scale'"):
        await ModelStore(tmp_path).fetch(region.download(), "other", ref, unsigned)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "../../etc/passwd"},
        {"onnx": {"digest": "../../../x", "size_bytes": 1}},
        {"version": 0},
    ],
)
def test_a_manifest_that_points_outside_or_says_more_than_it_may_is_refused(changes: dict[str, Any]) -> None:
    wanted = manifest(1, b"onnx", b"smoke").model_dump(mode="json")
    assert decode_release(ReleaseManifest.model_validate(wanted).model_dump_json().encode())
    with pytest.raises(MalformedMessage, match="release manifest"):
        decode_release(json.dumps({**wanted, **changes}).encode())


def test_what_is_active_or_last_known_good_is_never_swept(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    refs = [ref_of(bytes([n])) for n in range(4)]
    for ref in refs:
        store.folder(ref).mkdir()
    store.set_current(Current(model="m", counter=1, rollout="r", release=refs[0], previous=refs[1]))
    store.sweep([refs[2]])
    assert [store.has(ref) for ref in refs] == [True, True, True, False]
    assert len(list(chunked([b"x"]))) == 1
