"""One port for several applications: that of the installation, and those of its tenants below `/tenants/NAME`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from aiohttp import web
from yarl import URL

from fedtide.coordinator.api.http import PREFIX, problem

BELOW = "/tenants/"


class Mounts(web.AbstractResource):
    """Finds the application of a request. Tenants come and go while it serves.

    Args:
        main: the installation's own.
        elsewhere: tenants that there are, but that are not served at the moment.
        away: what those who ask for one of these are told.
    """

    def __init__(
        self, main: web.Application, elsewhere: Callable[[], Mapping[str, object]], away: Callable[[], web.Response]
    ) -> None:
        super().__init__()
        self._main = frozen(main)
        self._tenants: dict[str, web.Application] = {}
        self._elsewhere = elsewhere
        self._nowhere = _always(_nobody_known)
        self._away = _always(away)

    def mount(self, tenant: str, app: web.Application) -> None:
        app[PREFIX] = f"{BELOW}{tenant}"
        self._tenants[tenant] = frozen(app)

    def unmount(self, tenant: str) -> None:
        self._tenants.pop(tenant, None)

    async def resolve(self, request: web.Request) -> Any:
        if not request.path.startswith(BELOW):
            return await _found_in(self._main, request)
        name, slash, rest = request.rel_url.raw_path.removeprefix(BELOW).partition("/")
        if not slash:  # a relative redirect of the page would lead to another tenant
            return await _found_in(_always(lambda: web.HTTPPermanentRedirect(f"{BELOW}{name}/")), request)
        app = self._tenants.get(name)
        if app is None:
            return await _found_in(self._away if name in self._elsewhere() else self._nowhere, request)
        below = URL.build(path=f"/{rest}", query_string=request.rel_url.raw_query_string, encoded=True)
        return await _found_in(app, request.clone(rel_url=below))

    @property
    def canonical(self) -> str:
        return "/"

    def url_for(self, **_: str) -> URL:
        raise RuntimeError("what is mounted has no address of its own")

    def add_prefix(self, prefix: str) -> None:
        raise RuntimeError("it is mounted at the root")

    def get_info(self) -> Any:
        return {"prefix": "/", "routes": self}

    def freeze(self) -> None:
        pass

    def raw_match(self, path: str) -> bool:
        return path == "/"

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[web.AbstractRoute]:
        return iter(())


def root_of(mounts: Mounts, most_bytes: int) -> web.Application:
    """What a server serves. It has a middleware, or aiohttp would leave out those of the applications below it."""

    @web.middleware
    async def passes(request: web.Request, handler: Any) -> web.StreamResponse:
        answered: web.StreamResponse = await handler(request)
        return answered

    app = web.Application(client_max_size=most_bytes, middlewares=[passes])
    app.router.register_resource(mounts)
    return app


def frozen(app: web.Application) -> web.Application:
    app.pre_freeze()
    app.freeze()
    return app


async def _found_in(app: web.Application, request: web.Request) -> Any:
    found = await app.router.resolve(request)
    found.add_app(app)
    return found, set()


def _always(answer: Callable[[], web.StreamResponse]) -> web.Application:
    async def handle(_: web.Request) -> web.StreamResponse:
        return answer()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    return frozen(app)


def _nobody_known() -> web.Response:
    """As to a stranger with a wrong token. Names are no secret: a tenant's login page answers everybody."""
    return problem(401, "the API token is missing or wrong", "Set FEDTIDE_TOKEN; is the tenant's name right?", 77)
