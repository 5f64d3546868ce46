"""The API's port: open from the start. A standby sends callers to the leader; the leader answers them."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import Callable, Mapping

import aiohttp
from aiohttp import web

from fedtide.coordinator.api.http import MOST_BYTES, problem
from fedtide.coordinator.api.mounts import Mounts, root_of
from fedtide.coordinator.api.standby_proxy import StandbyProxy
from fedtide.coordinator.config import CoordinatorConfig
from fedtide.coordinator.log.leader_lease import Leadership
from fedtide.fabric.errors import ConfigError
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.process.listening import EVERYWHERE, in_url, listening_socket

log = logging.getLogger(__name__)

LOOK_EVERY_S = 30.0


class FrontDoor:
    """One listening socket, and the application behind it."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._socket: socket.socket | None = None
        self._runner: web.AppRunner | None = None
        self._leadership: Leadership | None = None
        self._tls: ssl.SSLContext | None = None
        self._proxy = StandbyProxy(config.ca_file, config.http_server_name) if config.standby == "proxy" else None
        self.url = ""
        self.advertised = ""
        """Where other coordinators reach it."""
        self._mounts: Mounts | None = None

    async def open(self) -> str:
        """Take the port and answer as a standby; returns the URL.

        Raises:
            ConfigError: the port is taken.
        """
        config = self._config
        try:
            self._tls = _tls(config)
            self._socket = listening_socket(config.http_host, config.http_port)
        except OSError as exc:
            raise ConfigError(
                "http_port", f"port {config.http_port} cannot be used: {exc.strerror}", "Choose another, or 0"
            ) from exc
        host, port = self._socket.getsockname()[:2]
        scheme = "https" if self._tls else "http"
        shown = "127.0.0.1" if config.http_host in EVERYWHERE else host
        self.url = f"{scheme}://{in_url(shown)}:{port}"
        app = web.Application(client_max_size=0)
        app.router.add_get("/healthz", self._health)
        app.router.add_route("*", "/{path:.*}", self._send_on)
        await self._show(app)
        address = self._config.advertise_host
        advertised = f"{scheme}://{in_url(address)}:{port}" if address else self.url
        self.advertised = self._config.advertise_url or advertised
        return self.advertised

    async def keep_certificate(self) -> None:
        """Use a certificate that was renewed for connections to come; for ever."""
        seen = _changed(self._config)
        while self._tls is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            if (changed := _changed(self._config)) != seen:
                try:
                    _load(self._tls, self._config)
                    seen = changed
                    log.info("api.certificate_renewed")
                except (OSError, ConfigError) as exc:  # half written: the old one goes on
                    log.warning("api.certificate_not_read", extra={"reason": str(exc)})

    def stand_by(self, leadership: Leadership) -> None:
        """From here on callers are sent to whoever leads."""
        self._leadership = leadership

    async def serve(self, app: web.Application, tenants: Callable[[], Mapping[str, object]]) -> None:
        """This process leads: answer with `app`, and write down the address.

        Args:
            tenants: those that there are, by name; `mount` serves them.
        """
        self._mounts = Mounts(app, tenants, _nobody)
        root = root_of(self._mounts, MOST_BYTES)
        root.router.add_get("/healthz", self._health)
        await self._show(root)
        log.info("api.listening", extra={"url": self.url})
        if self._config.endpoint_file is not None:
            write_atomically(self._config.endpoint_file, json.dumps({"url": self.url}).encode())

    def mount(self, tenant: str, app: web.Application) -> None:
        """Answer with `app` what is asked of a tenant."""
        assert self._mounts is not None, "tenants are served by a process that leads"
        self._mounts.mount(tenant, app)

    def unmount(self, tenant: str) -> None:
        if self._mounts is not None:
            self._mounts.unmount(tenant)

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._proxy is not None:
            await self._proxy.close()
        if self._socket is not None:
            self._socket.close()

    async def _show(self, app: web.Application) -> None:
        assert self._socket is not None
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        old, self._runner = self._runner, runner
        # The listening socket stays open: in between, the kernel queues new connections.
        copy = self._socket.dup()
        if old is not None:
            await old.cleanup()
        await web.SockSite(runner, copy, ssl_context=self._tls).start()

    async def _health(self, _: web.Request) -> web.Response:
        leads = self._leadership is not None and self._leadership.is_mine
        return web.json_response({"role": "leader" if leads else "standby"})

    async def _send_on(self, request: web.Request) -> web.StreamResponse:
        leader = self._leadership.leader if self._leadership is not None else None
        if leader is None or not leader.url or leader.url == self.advertised:
            return _nobody()
        if self._proxy is None:
            return web.Response(status=307, headers={"Location": f"{leader.url}{request.path_qs}"})
        try:
            return await self._proxy.pass_on(leader.url, request)
        except aiohttp.ClientError as exc:
            log.info("proxy.no_answer", extra={"leader": leader.url, "reason": str(exc)})
            return _nobody()


def _nobody() -> web.Response:
    response = problem(503, "no coordinator leads at the moment", "Try again", 75)
    response.headers["Retry-After"] = "1"  # distinguishes it from the 503 of a leader
    return response


def _tls(config: CoordinatorConfig) -> ssl.SSLContext | None:
    if config.http_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    _load(context, config)
    return context


def _changed(config: CoordinatorConfig) -> list[int]:
    """When the files of the certificate were written last; none that is missing."""
    files = (file for file in (config.http_cert, config.http_key) if file is not None and file.exists())
    return [file.stat().st_mtime_ns for file in files]


def _load(context: ssl.SSLContext, config: CoordinatorConfig) -> None:
    assert config.http_cert is not None
    try:
        context.load_cert_chain(config.http_cert, config.http_key)
    except OSError as exc:
        raise ConfigError(
            "http_cert", f"{config.http_cert} cannot be used: {exc}", "It is a PEM file, with http_key"
        ) from exc
