"""Who may call a node's own HTTP server: programs on the node, whoever shows the node's token, or, if its owner says
so, everybody who wants a prediction.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from fedtide.edge_agent.config import AgentConfig
from fedtide.edge_agent.serving.node_metrics import PATH
from fedtide.fabric.process.web_access import TokenFile, is_loopback, why_foreign

OPEN = ("/v2", "/v2/health/live", "/v2/health/ready", PATH)
"""What probes and Prometheus ask."""


def access_middleware(config: AgentConfig) -> Any:
    """Checks each request before any route sees it.

    Raises:
        ConfigError: the token cannot be read, or is empty.
    """
    token = TokenFile(config.http_token_file) if config.http_token_file is not None else None
    on_the_node = is_loopback(config.http_host)

    @web.middleware
    async def check(request: web.Request, handler: Any) -> web.StreamResponse:
        if (reason := why_foreign(request.headers, listens_on=config.http_host)) is not None:
            return web.json_response({"error": reason}, status=403)
        shown = token.shown_by(request.headers) if token is not None else on_the_node
        if not (shown or request.path in OPEN or (config.open_inference and _asks_a_model(request.path))):
            error = "this needs the node's token: Authorization: Bearer ..., see http_token_file and open_inference"
            return web.json_response({"error": error}, status=401)
        response: web.StreamResponse = await handler(request)
        return response

    return check


def _asks_a_model(path: str) -> bool:
    return path.startswith("/v2/models/") and path.rpartition("/")[2] not in ("labels", "samples")
