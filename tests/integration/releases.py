"""Makes releases in a running installation: tiny real ONNX graphs, good ones and bad ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedtide.aggregation.release.onnx_parts import cut
from fedtide.console import endpoints
from fedtide.coordinator.identity.report_rules import IMPORT
from fedtide.fabric.events.envelope import Event, ModelProduced, ReleasePublished, decode_event
from fedtide.fabric.events.runs import RunRequested
from fedtide.fabric.ids import new_id
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import EVENTS, HUB_REGION, RELEASES, Subjects
from fedtide.fabric.nats.transfer import put_blob
from fedtide.fabric.plans.release import Export, Lineage, ReleaseManifest
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef, chunked, manifest_of
from fedtide.fabric.tensors.frame import Buffer, Tensor, encode
from fedtide.fabric.trust.claims import produced_claim
from fedtide.fabric.trust.provenance import external, sealed, statement
from fedtide.fabric.trust.signatures import Mandate, RunSigner, mandate_of
from tests.conftest import APPS
from tests.hub import Hub
from tests.integration.installation import Installation, until

SUBJECTS = Subjects()


def graph(factor: float) -> bytes:
    """y = x * factor, for any batch of three numbers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    constant = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    body = helper.make_graph([helper.make_node("Mul", ["x", "factor"], ["y"])], "scale", [x], [y], [constant])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(onnx.ModelProto.SerializeToString(model))


def smoke(factor: float) -> list[Buffer]:
    x = np.array([[1, 2, 3]], np.float32)
    return encode([Tensor.of("in.x", x), Tensor.of("out.y", x * np.float32(factor))])


def release(
    there: Installation, factor: float, *, promised: float | None = None, onnx_bytes: bytes | None = None
) -> int:
    """Put a release into the registry; returns its version once it is there."""
    version = len(_versions(there, "scale")) + 1
    sample = smoke(factor if promised is None else promised)
    asyncio.run(publish(there.hub, version, onnx_bytes or graph(factor), sample))
    until(lambda: len(_versions(there, "scale")) == version, "the release")
    return version


def trained_release(there: Installation, factor: float) -> int:
    """Report a model as the product of a run, as an aggregator would; returns its version once it is published."""
    run = there.train(APPS / "mean", "--rounds", "1").run
    before = len(_versions(there, "scale"))
    asyncio.run(produce(there.hub, run, factor))
    until(lambda: len(_versions(there, "scale")) > before, "the release")
    return _versions(there, "scale")[-1]


async def produce(
    hub: Hub,
    run: str,
    factor: float,
    *,
    onnx_bytes: bytes | None = None,
    arrays: Sequence[Tensor] = (),
    model: str = "scale",
) -> None:
    """Report a model as the product of `run`; `arrays` are what a run that starts from it starts from."""
    broker = await hub.connect("test-producer")
    keep: dict[str, BlobRef] = {}
    for name, parts in (
        ("onnx", [onnx_bytes or graph(factor)]),
        ("smoke", smoke(factor)),
        ("arrays", encode(arrays)),
    ):
        keep[name] = await put_blob(broker, SUBJECTS.release_blob, RELEASES, parts, ttl_s=None)
    produced = ModelProduced(run=run, model=model, export=Export(), metrics={"accuracy": factor}, **keep)
    if hub.director:
        speaker = RunSigner()
        app = await _app_of(broker, run)
        mandate = Mandate(run=run, attempt=1, app=app, key=speaker.key, ends_at=time.time() + 3600)
        speaker.mandate = mandate_of(hub.director, mandate)
        signature = speaker.sign(produced_claim(produced))
        produced = produced.model_copy(update={"signature": signature, "mandate": speaker.mandate})
    event = Event.now("test", produced, id=new_id("produced"))
    await broker.publish(SUBJECTS.report(HUB_REGION, run, "model-produced"), event.model_dump_json().encode())
    await broker.close()


async def _app_of(broker: Broker, run: str) -> str:
    """The digest of what the newest run trains, as the log has it."""
    stored = await broker.last(EVENTS, SUBJECTS.event("run", "requested"))
    assert stored is not None
    data = decode_event(stored.data).data
    assert isinstance(data, RunRequested)
    assert data.run == run
    return data.spec.app.bundle.digest


async def publish(
    hub: Hub,
    version: int,
    content: bytes,
    sample: Sequence[Buffer],
    model: str = "scale",
    export: Export | None = None,
) -> BlobRef:
    """Put a release into the registry as if a run had brought it."""
    broker = await hub.connect("test-publisher")

    async def keep(parts: Sequence[Buffer]) -> BlobRef:
        return await put_blob(broker, SUBJECTS.release_blob, RELEASES, parts, ttl_s=None)

    app = AppRef(name="app", bundle=BlobRef(digest="0" * 64, size_bytes=0))
    manifest = ReleaseManifest(
        model=model,
        version=version,
        onnx=manifest_of(list(chunked([content]))).ref,
        parts=[await keep([part]) for part in cut(content)],
        arrays=await keep([b"-"]),
        smoke=await keep(sample),
        export=export or Export(),
        lineage=Lineage(app=app, run=f"run-{model}-{version}", rounds=1, participants=1, updates=1),
    )
    raw = manifest.model_dump_json().encode()
    ref = await keep([raw])
    vouched = sealed(statement(raw, {"buildDefinition": {"externalParameters": external(manifest)}}), hub.releases)
    attestation = await keep([vouched.encode()]) if hub.releases else None
    event = Event.now("test", ReleasePublished(release=ref, manifest=manifest, attestation=attestation))
    await broker.publish(SUBJECTS.report(HUB_REGION, IMPORT, "release-published"), event.model_dump_json().encode())
    await broker.close()
    return ref


def _versions(there: Installation, model: str) -> list[int]:
    models = {m.model: m for m in there.client.every(endpoints.models())}
    return [r.version for r in models[model].releases] if model in models else []
