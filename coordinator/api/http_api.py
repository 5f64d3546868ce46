"""The HTTP API: what the CLI, the dashboard and other programs call. Everything is JSON.

Streams (`/watch`) are newline-delimited JSON: one whole view a line, sent when it changed. An empty
line is the end: a stream that stops without it was cut off.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.adapters.starting import RunRequest, Starter
from fedtide.coordinator.log.engine import Engine, views_of
from fedtide.coordinator.runs import runs, selection, views
from fedtide.fabric.errors import ConfigError, FedtideError, NotFound, TransientError
from fedtide.fabric.events.runs import RunCancelRequested, RunPauseRequested, RunResumeRequested
from fedtide.fabric.flower.apps import MAX_BUNDLE_BYTES
from fedtide.fabric.ids import new_id
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import DOWN, Subjects
from fedtide.fabric.nats.transfer import put_blob

M = TypeVar("M", bound=BaseModel)


class Api:
    """Handlers over the engine's world."""

    def __init__(
        self, broker: Broker, subjects: Subjects, engine: Engine, presence: Presence, starter: Starter
    ) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._presence = presence
        self._starter = starter

    def application(self, *more: Iterable[web.RouteDef], checks: Sequence[Any] = ()) -> web.Application:
        """The API; `more` are routes of other handlers, `checks` middlewares that come first."""
        app = web.Application(client_max_size=MAX_BUNDLE_BYTES + 1, middlewares=[*checks, _errors_as_json])
        app.add_routes(
            [
                web.get("/v1/status", self._status),
                web.get("/v1/nodes", self._nodes),
                web.get("/v1/nodes/{node}", self._node),
                web.put("/v1/bundles", self._put_bundle),
                web.get("/v1/runs", self._runs),
                web.post("/v1/runs", self._start_run),
                web.get("/v1/runs/{run}", self._run),
                web.get("/v1/runs/{run}/watch", self._watch_run),
                web.post("/v1/runs/{run}/cancel", self._cancel_run),
                web.post("/v1/runs/{run}/pause", self._pause_run),
                web.post("/v1/runs/{run}/resume", self._resume_run),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model}", self._model),
                web.get("/v1/models/{model}/versions/{version}/onnx", self._onnx),
            ]
        )
        for routes in more:
            app.add_routes(routes)
        return app

    async def _status(self, _: web.Request) -> web.Response:
        world = self._engine.world
        online = [n for n in world.nodes.values() if n.online]
        return web.json_response(
            {
                "events": self._engine.applied,
                "refused_events": self._engine.refused,
                "nodes": {"online": len(online), "known": len(world.nodes)},
                "regions": sorted({n.region for n in world.nodes.values()}),
                "runs": {
                    "active": sum(isinstance(r, runs.Running) for r in world.runs.values()),
                    "all": len(world.runs),
                },
                "models": len(world.models),
                "rollouts": len(world.rollouts),
            }
        )

    def _node_view(self, name: str) -> views.View:
        return views.node(self._engine.world.node(name), self._presence.telemetry.get(name, {}))

    async def _nodes(self, _: web.Request) -> web.Response:
        return web.json_response([self._node_view(n) for n in sorted(self._engine.world.nodes)])

    async def _node(self, request: web.Request) -> web.Response:
        return web.json_response(self._node_view(request.match_info["node"]))

    async def _put_bundle(self, request: web.Request) -> web.Response:
        parts: list[bytes | memoryview] = [await request.read()]
        ref = await put_blob(self._broker, self._subjects.blob, DOWN, parts, ttl_s=None)
        return web.json_response(ref.model_dump())

    def _run_view(self, key: str) -> views.View:
        world = self._engine.world
        state, release = world.run(key), world.release_of(key)
        return views.run(
            state,
            publishing=world.is_publishing(key),
            version=release.manifest.version if release is not None else None,
            matching=sum(selection.why_not(n, state.facts.spec) is None for n in world.nodes.values()),
            doing=lambda node: views.doing(key, world.nodes.get(node), self._presence.telemetry.get(node, {})),
        )

    async def _runs(self, _: web.Request) -> web.Response:
        return web.json_response([self._run_view(key) for key in self._engine.world.runs])

    async def _start_run(self, request: web.Request) -> web.Response:
        key = key_of(request, "run")
        if key not in self._engine.world.runs:
            await self._starter.run(key, await read_body(request, RunRequest))
        return web.json_response(self._run_view(key), status=201)

    async def _run(self, request: web.Request) -> web.Response:
        return web.json_response(self._run_view(request.match_info["run"]))

    async def _watch_run(self, request: web.Request) -> web.StreamResponse:
        key, world = request.match_info["run"], self._engine.world
        world.run(key)

        def over() -> bool:
            return isinstance(world.runs[key], runs.Ended) and not world.is_publishing(key)

        return await stream(self._engine, request, lambda: self._run_view(key), over)

    async def _cancel_run(self, request: web.Request) -> web.Response:
        key = request.match_info["run"]
        if not isinstance(self._engine.world.run(key), runs.Ended):
            await self._engine.submit(RunCancelRequested(run=key))
        return web.json_response(self._run_view(key))

    async def _pause_run(self, request: web.Request) -> web.Response:
        key = request.match_info["run"]
        state = self._engine.world.run(key)
        if isinstance(state, runs.Ended):
            raise ConfigError(key, f"is {state.outcome}, there is nothing to pause")
        if isinstance(state, runs.Running) and not state.resumable:
            raise ConfigError(key, "its app keeps its rounds to itself: a pause would lose them", "Cancel it, or wait")
        await self._engine.submit(RunPauseRequested(run=key))
        return web.json_response(self._run_view(key))

    async def _resume_run(self, request: web.Request) -> web.Response:
        key = request.match_info["run"]
        state = self._engine.world.run(key)
        if not isinstance(state, runs.Paused):
            raise ConfigError(key, f"is {self._run_view(key)['state']}, not paused")
        await self._engine.submit(RunResumeRequested(run=key))
        return web.json_response(self._run_view(key))

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response([views.model(m) for _, m in sorted(self._engine.world.models.items())])

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(views.model(self._engine.world.model(request.match_info["model"])))

    async def _onnx(self, request: web.Request) -> web.Response:
        model, wanted = self._engine.world.model(request.match_info["model"]), request.match_info["version"]
        for release in model.releases:
            if wanted in (str(release.manifest.version), "latest") and (wanted != "latest" or release is model.latest):
                data = await Distribution(self._broker, self._subjects).onnx(release.manifest)
                return web.Response(body=data, content_type="application/octet-stream")
        raise NotFound(f"model {model.name!r} has no release {wanted}", "See `fedtide model ls`")


async def stream(
    engine: Engine, request: web.Request, view: Callable[[], object], last: Callable[[], bool]
) -> web.StreamResponse:
    """`view()` now and at every change, a line each, until `last()` holds."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    async for snapshot in views_of(engine, view, last=last):
        await response.write(json.dumps(snapshot).encode() + b"\n")
    await response.write(b"\n")
    await response.write_eof()
    return response


def key_of(request: web.Request, what: str) -> str:
    """The id of what a request starts: the same for a request that is sent again under one `Idempotency-Key`."""
    asked = request.headers.get("Idempotency-Key")
    return new_id(what) if not asked else f"{what}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def what_is_wrong(error: ValidationError, kind: type[BaseModel]) -> ConfigError:
    """The first problem of a document as an error that says what there is instead."""
    first = error.errors()[0]
    where, what, remedy = ".".join(map(str, first["loc"])) or "body", first["msg"], ""
    if first["type"] == "extra_forbidden":
        name, known = str(first["loc"][-1]), list(kind.model_fields)
        near = difflib.get_close_matches(name, known, n=1) if len(first["loc"]) == 1 else []
        what = "is no field" + (f"; did you mean {near[0]!r}?" if near else "")
        remedy = f"There are {', '.join(known)}" if len(first["loc"]) == 1 else ""
    elif first["type"] == "union_tag_not_found":
        what, remedy = "does not say its kind", "Write `kind: ...` first"
    return ConfigError(where, what, remedy)


async def read_body(request: web.Request, kind: type[M]) -> M:
    """The request's JSON body as a model; raises ConfigError naming the field that is wrong."""
    try:
        return kind.model_validate_json(await request.read())
    except ValidationError as exc:
        raise what_is_wrong(exc, kind) from exc


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except FedtideError as exc:
        status = {NotFound: 404, ConfigError: 400}.get(type(exc), 503 if isinstance(exc, TransientError) else 409)
        body = {"error": exc.what, "remedy": exc.remedy, "exit_code": exc.exit_code}
        return web.json_response(body, status=status)
    except web.HTTPException as exc:
        return web.json_response({"error": exc.text or exc.reason, "remedy": "", "exit_code": 1}, status=exc.status)
