"""The node's inference server: Open Inference Protocol v2 over HTTP, JSON bodies.

https://github.com/kserve/open-inference-protocol. Inference runs in worker threads, so the
loop stays free; the model is looked up once a request, so a swap never mixes releases in one.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from aiohttp import web

from edge_agent.config import AgentConfig
from edge_agent.sessions import Model, TensorSpec
from fabric.errors import ConfigError, RemoteError

_DATATYPES = {
    "FP32": "float32",
    "FP64": "float64",
    "FP16": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT16": "int16",
    "INT8": "int8",
    "UINT64": "uint64",
    "UINT32": "uint32",
    "UINT16": "uint16",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_DATATYPE_OF = {np.dtype(v): k for k, v in _DATATYPES.items()}
MAX_BODY_BYTES = 64 * 1024 * 1024


class InferenceServer:
    """Serves `models`; `swap` replaces one release by another between two requests."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._models: dict[str, Model] = {}
        self._threads = ThreadPoolExecutor(config.inference_threads, thread_name_prefix="inference")
        self._runner: web.AppRunner | None = None
        self.url = ""
        self.served = 0

    def swap(self, model: Model) -> None:
        self._models[model.manifest.model] = model

    def remove(self, name: str) -> None:
        self._models.pop(name, None)

    def serving(self) -> dict[str, str]:
        """Model name to release digest."""
        return {name: model.release.digest for name, model in self._models.items()}

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the port is taken.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_errors_as_json])
        app.add_routes(
            [
                web.get("/v2", self._server_metadata),
                web.get("/v2/health/live", _ok),
                web.get("/v2/health/ready", _ok),
                *self._model_routes("/v2/models/{model}"),
                *self._model_routes("/v2/models/{model}/versions/{version}"),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._config.http_host, self._config.http_port)
        try:
            await site.start()
        except OSError as exc:
            raise ConfigError(
                "http_port", f"port {self._config.http_port} cannot be used: {exc.strerror}", "Choose another, or 0"
            ) from exc
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    def _model_routes(self, prefix: str) -> list[web.RouteDef]:
        return [
            web.get(prefix, self._metadata),
            web.get(f"{prefix}/ready", self._ready),
            web.post(f"{prefix}/infer", self._infer),
        ]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        self._threads.shutdown(wait=False)

    def _model(self, request: web.Request) -> Model:
        name, version = request.match_info["model"], request.match_info.get("version")
        model = self._models.get(name)
        if model is None:
            raise web.HTTPNotFound(text=f"no model {name!r} is served here")
        if version is not None and version != str(model.manifest.version):
            raise web.HTTPNotFound(text=f"model {name!r} is served in version {model.manifest.version}, not {version}")
        return model

    async def _server_metadata(self, _: web.Request) -> web.Response:
        return web.json_response({"name": "fedtide", "version": "2", "extensions": []})

    async def _ready(self, request: web.Request) -> web.Response:
        self._model(request)
        return web.json_response({"ready": True})

    async def _metadata(self, request: web.Request) -> web.Response:
        model = self._model(request)
        return web.json_response(
            {
                "name": model.manifest.model,
                "versions": [str(model.manifest.version)],
                "platform": "onnxruntime_onnx",
                "inputs": [_describe(s) for s in model.inputs],
                "outputs": [_describe(s) for s in model.outputs],
                "parameters": {"release": model.release.digest, "labels": model.manifest.export.labels},
            }
        )

    async def _infer(self, request: web.Request) -> web.Response:
        model = self._model(request)
        try:
            body = await request.json()
            inputs = {str(i["name"]): _parse(i) for i in body["inputs"]}
            wanted = [str(o["name"]) for o in body.get("outputs", [])]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise RemoteError(f"malformed inference request: {exc}") from exc
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._threads, model.infer, inputs)
        unknown = sorted(set(wanted) - set(results))
        if unknown:
            raise RemoteError(f"the model has no output {unknown[0]!r}")
        self.served += 1
        answer: dict[str, Any] = {
            "model_name": model.manifest.model,
            "model_version": str(model.manifest.version),
            "parameters": {"release": model.release.digest},
            "outputs": [_output(n, a) for n, a in results.items() if not wanted or n in wanted],
        }
        if "id" in body:
            answer["id"] = body["id"]
        return web.json_response(answer)


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({"live": True, "ready": True})


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except RemoteError as exc:
        return web.json_response({"error": str(exc)}, status=400)
    except web.HTTPException as exc:
        return web.json_response({"error": exc.text or exc.reason}, status=exc.status)


def _parse(tensor: dict[str, Any]) -> npt.NDArray[Any]:
    datatype = str(tensor["datatype"])
    if datatype not in _DATATYPES:
        raise RemoteError(f"datatype {datatype!r} is not supported", f"Use one of {', '.join(_DATATYPES)}")
    shape = [int(n) for n in tensor["shape"]]
    array = np.asarray(tensor["data"], dtype=_DATATYPES[datatype])
    if min(shape, default=0) < 0 or math.prod(shape) != array.size:
        raise RemoteError(f"input {tensor['name']!r}: {array.size} elements do not fill shape {shape}")
    return array.reshape(shape)


def _output(name: str, array: npt.NDArray[Any]) -> dict[str, Any]:
    datatype = _DATATYPE_OF.get(array.dtype)
    if datatype is None:
        raise RemoteError(f"output {name!r} has dtype {array.dtype}, which the protocol does not carry")
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.reshape(-1).tolist()}


def _describe(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": _DATATYPE_OF.get(spec.dtype, "BYTES"), "shape": list(spec.shape)}
