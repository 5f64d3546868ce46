"""The API of models, of app bundles, and of the installation's status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from aiohttp import web

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.api.http import Listing, answer, name_in, page_of, query_of
from fedtide.coordinator.api.routes import BYTES, Route, get, put
from fedtide.coordinator.identity import identities
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.models import views
from fedtide.coordinator.runs import runs
from fedtide.coordinator.storage.housekeeping import Housekeeping
from fedtide.fabric.errors import NotFound
from fedtide.fabric.messages.views import ModelProgress, ModelView, NodeCounts, Page, RunCounts, StatusView
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import DOWN, Subjects
from fedtide.fabric.nats.transfer import put_blob
from fedtide.fabric.tensors.blobs import BlobRef, chunked, manifest_of


class ModelApi:
    """Handlers over the engine's registry."""

    def __init__(
        self,
        broker: Broker,
        subjects: Subjects,
        engine: Engine,
        housekeeping: Housekeeping,
        more_warnings: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._more_warnings = more_warnings
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._housekeeping = housekeeping

    def routes(self) -> list[Route]:
        return [
            get("/v1/status", self._status, "What the installation holds", StatusView),
            put("/v1/bundles", self._put_bundle, "Store an app's bundle", BlobRef, takes=BYTES),
            get("/v1/models", self._all, "Models", Page[ModelView], query=Listing),
            get("/v1/models/{model}", self._one, "A model and its releases", ModelView),
            get("/v1/models/{model}/progress", self._progress, "What is going on with a model", ModelProgress),
            get("/v1/models/{model}/versions/{version}/onnx", self._onnx, "A release's ONNX file", media=BYTES),
        ]

    async def _status(self, _: web.Request) -> web.Response:
        return answer(self.status())

    def status(self) -> StatusView:
        engine, world = self._engine, self._engine.world
        online = sum(n.online for n in world.nodes.values())
        return StatusView(
            events=engine.applied,
            refused_events=engine.refused,
            nodes=NodeCounts(online=online, known=len(world.nodes)),
            regions=sorted({n.region for n in world.nodes.values()}),
            runs=RunCounts(active=sum(isinstance(r, runs.Running) for r in world.runs.values()), all=len(world.runs)),
            models=len(world.models),
            rollouts=len(world.rollouts),
            waits_for=engine.waits_for,
            warnings=[
                *self._housekeeping.warnings(),
                *identities.warnings(world.identities),
                *self._more_warnings(),
            ],
        )

    async def _put_bundle(self, request: web.Request) -> web.Response:
        parts: list[bytes | memoryview] = [await request.read()]
        ref = await asyncio.to_thread(lambda: manifest_of(list(chunked(parts))).ref)
        self._housekeeping.uploaded(ref.digest)  # before: a sweep may be about to delete an old one
        return answer(await put_blob(self._broker, self._subjects.blob, DOWN, parts, ttl_s=None))

    def view(self, name: str) -> ModelView:
        return views.model(self._engine.world.model(name))

    async def _all(self, request: web.Request) -> web.Response:
        return answer(self.page(query_of(request, Listing)))

    def page(self, query: Listing) -> Page[ModelView]:
        return page_of(query, sorted(self._engine.world.models), self.view)

    async def _one(self, request: web.Request) -> web.Response:
        return answer(self.view(name_in(request, "model")))

    async def _progress(self, request: web.Request) -> web.Response:
        """Of any name: a model has its first run before its first release."""
        name, world = name_in(request, "model"), self._engine.world
        model = world.models.get(name)
        of_model = [r for r in world.runs.values() if r.facts.spec.model == name]
        run = max(of_model, key=lambda r: (not isinstance(r, runs.Ended), r.facts.requested_at), default=None)
        rolled_out = [r for r in world.rollouts.values() if r.facts.plan.model == name]
        rollout = max(rolled_out, key=lambda r: r.facts.started_at, default=None)
        return answer(
            ModelProgress(
                model=name,
                latest=model.latest.manifest.version if model is not None and model.latest is not None else None,
                serving={str(version): nodes for version, nodes in world.served_by(name).items()},
                run=run.facts.run if run is not None else "",
                rollout=rollout.facts.rollout if rollout is not None else "",
            )
        )

    async def _onnx(self, request: web.Request) -> web.Response:
        model, wanted = self._engine.world.model(name_in(request, "model")), name_in(request, "version")
        for release in model.releases:
            if wanted == str(release.manifest.version) or (wanted == "latest" and release is model.latest):
                data = await Distribution(self._broker, self._subjects).onnx(release.manifest)
                return web.Response(body=data, content_type="application/octet-stream")
        raise NotFound(f"model {model.name!r} has no release {wanted!r}", "See `fedtide model ls`")
