"""The node's inference server: Open Inference Protocol v2 over HTTP, and labels that arrive later.

https://github.com/kserve/open-inference-protocol. `live` is true while the process answers;
`ready` once every model that the node should serve is loaded, and until it stops.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.serving.access import access_middleware
from fedtide.edge_agent.serving.batching import Overloaded
from fedtide.edge_agent.serving.protocol import HEADER_LENGTH, datatype, decode_request, encode_response
from fedtide.edge_agent.serving.serving import Serving
from fedtide.edge_agent.serving.sessions import GraphTensor, InferenceFailed, Model
from fedtide.fabric.errors import ConfigError, NotFound, RemoteError
from fedtide.fabric.process.listening import EVERYWHERE, in_url, listening_socket

MAX_BODY_BYTES = 64 * 1024 * 1024
EXTENSIONS = ["binary_tensor_data"]


class InferenceServer:
    """The HTTP server of `serving`; `more` are routes of other parts of the agent."""

    def __init__(self, config: AgentConfig, serving: Serving) -> None:
        self._config = config
        self._serving = serving
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.ready = False

    async def start(self, *more: list[web.RouteDef]) -> None:
        """Listen.

        Raises:
            ConfigError: the port is taken.
        """
        checks = [_errors_as_json, access_middleware(self._config)]
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=checks)
        app.add_routes(
            [
                web.get("/v2", self._server_metadata),
                web.get("/v2/health/live", _live),
                web.get("/v2/health/ready", self._server_ready),
                *self._model_routes("/v2/models/{model}"),
                *self._model_routes("/v2/models/{model}/versions/{version}"),
            ]
        )
        for routes in more:
            app.add_routes(routes)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            listening = listening_socket(self._config.http_host, self._config.http_port)
            await web.SockSite(self._runner, listening).start()
        except OSError as exc:
            raise ConfigError(
                "http_port", f"port {self._config.http_port} cannot be used: {exc.strerror}", "Choose another, or 0"
            ) from exc
        host = self._config.http_host
        port = listening.getsockname()[1]
        # For programs beside the node: a socket that listens everywhere has no address of its own.
        self.url = f"http://{in_url('127.0.0.1' if host in EVERYWHERE else host)}:{port}"

    def _model_routes(self, prefix: str) -> list[web.RouteDef]:
        return [
            web.get(prefix, self._metadata),
            web.get(f"{prefix}/ready", self._model_ready),
            web.post(f"{prefix}/infer", self._infer),
        ]

    async def stop(self) -> None:
        """Refuse new requests, answer those in progress, and stop."""
        self.ready = False
        if self._runner is not None:
            await self._runner.cleanup()

    async def _server_metadata(self, _: web.Request) -> web.Response:
        return web.json_response({"name": "fedtide", "version": "2", "extensions": EXTENSIONS})

    async def _server_ready(self, _: web.Request) -> web.Response:
        return web.json_response({"ready": self.ready}, status=200 if self.ready else 503)

    def _model(self, request: web.Request) -> Model:
        return self._serving.model(request.match_info["model"], request.match_info.get("version"))

    async def _model_ready(self, request: web.Request) -> web.Response:
        self._model(request)
        return web.json_response({"ready": True})

    async def _metadata(self, request: web.Request) -> web.Response:
        model = self._model(request)
        return web.json_response(
            {
                "name": model.name,
                "versions": [m.version for m in self._serving.versions(model.name)],
                "platform": "onnxruntime_onnx",
                "inputs": [_describe(s) for s in model.inputs],
                "outputs": [_describe(s) for s in model.outputs],
                "parameters": {"release": model.release.digest, "labels": model.manifest.export.labels},
            }
        )

    async def _infer(self, request: web.Request) -> web.Response:
        length = request.headers.get(HEADER_LENGTH)
        info = request.match_info
        body, json_length = await answer(
            self._serving, info["model"], info.get("version"), await request.read(), length
        )
        if json_length is None:
            return web.Response(body=body, content_type="application/json")
        headers = {HEADER_LENGTH: str(json_length)}
        return web.Response(body=body, content_type="application/octet-stream", headers=headers)


async def answer(
    serving: Serving, model: str, version: str | None, body: bytes, json_length: str | None
) -> tuple[bytes, int | None]:
    """Answer one inference request; request and response are in the protocol's bytes.

    Raises:
        NotFound, RemoteError, Overloaded, InferenceFailed: as `Serving.infer`.
    """
    if json_length is not None and not json_length.isdecimal():
        raise RemoteError(f"{HEADER_LENGTH} is {json_length!r}, not a number")
    request = decode_request(body, int(json_length) if json_length is not None else None)
    used, outputs = await serving.infer(model, version, request.inputs, request.id)
    return encode_response((used.name, used.version, used.release.digest), outputs, request)


async def _live(_: web.Request) -> web.Response:
    return web.json_response({"live": True})


def status_of(error: Exception) -> int:
    """The HTTP status for an error."""
    match error:
        case NotFound():
            return 404
        case Overloaded():
            return 429
        case InferenceFailed():
            return 500
        case _:
            return 400


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except (RemoteError, NotFound, Overloaded) as exc:
        headers = {"Retry-After": "1"} if isinstance(exc, Overloaded) else None
        return web.json_response({"error": str(exc)}, status=status_of(exc), headers=headers)
    except web.HTTPException as exc:
        return web.json_response({"error": exc.text or exc.reason}, status=exc.status)


def _describe(spec: GraphTensor) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype(spec.dtype), "shape": list(spec.shape)}
