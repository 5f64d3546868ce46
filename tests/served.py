"""Loaded releases for tests, without a broker: tiny real graphs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.serving.sessions import Model
from fedtide.fabric.plans.release import Export, Lineage, ReleaseManifest
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef, chunked, manifest_of
from tests.integration.releases import graph, smoke


def config(folder: Path, **changes: Any) -> AgentConfig:
    fixed = {"node": "n1", "region": "eu", "nats_url": "nats://127.0.0.1:1", "data_dir": folder}
    return AgentConfig.model_validate({**fixed, **changes})


def ref_of(data: bytes) -> BlobRef:
    return manifest_of(list(chunked([data]))).ref


def manifest(version: int, onnx: bytes, sample: bytes, name: str = "scale", **more: Any) -> ReleaseManifest:
    lineage = Lineage(app=AppRef(name="app", bundle=ref_of(b"app")), run="run-1", rounds=1, participants=1, updates=1)
    return ReleaseManifest(
        model=name,
        version=version,
        onnx=ref_of(onnx),
        arrays=ref_of(b""),
        smoke=ref_of(sample),
        lineage=lineage,
        **more,
    )


def model(
    folder: Path,
    version: int = 1,
    factor: float | None = None,
    *,
    onnx: bytes | None = None,
    export: Export | None = None,
    **changes: Any,
) -> Model:
    """A release that multiplies by `factor` (its version, if not said), loaded from `folder`."""
    scale = float(version) if factor is None else factor
    content, sample = onnx or graph(scale), b"".join(smoke(scale))
    here = folder / f"release-{version}"
    here.mkdir(parents=True, exist_ok=True)
    (here / "model.onnx").write_bytes(content)
    (here / "smoke.safetensors").write_bytes(sample)
    told = manifest(version, content, sample, export=export or Export())
    return Model(ref_of(told.model_dump_json().encode()), told, here, config(folder, **changes))
