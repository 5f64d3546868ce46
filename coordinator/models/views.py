"""Models and releases as the API shows them. Pure."""

from __future__ import annotations

import math

from fedtide.coordinator.models.registry import Model, Release
from fedtide.fabric.messages.views import ModelView, ReleaseView


def model(state: Model) -> ModelView:
    latest = state.latest.manifest.version if state.latest is not None else None
    return ModelView(model=state.name, releases=[release(r) for r in state.releases], latest=latest)


def release(state: Release) -> ReleaseView:
    manifest = state.manifest
    return ReleaseView(
        version=manifest.version,
        digest=state.ref.digest,
        size_bytes=manifest.onnx.size_bytes,
        metrics={name: value if math.isfinite(value) else None for name, value in manifest.metrics.items()},
        labels=manifest.export.labels,
        lineage=manifest.lineage,
        signed=state.attestation is not None,
    )
