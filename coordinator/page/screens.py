"""The page's screens: each shows one view of the API, and the command that prints the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from aiohttp import web
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from pydantic import Field

from fedtide.coordinator.api.audit import AuditApi
from fedtide.coordinator.api.costs import CostApi, CostQuery
from fedtide.coordinator.api.events import EventApi, EventListing, WhyOptions
from fedtide.coordinator.api.fleet import FleetApi, NodeListing
from fedtide.coordinator.api.http import Listing, local_path, query_of
from fedtide.coordinator.api.identity import IdentityApi
from fedtide.coordinator.api.models import ModelApi
from fedtide.coordinator.api.people import PeopleApi
from fedtide.coordinator.api.rollouts import RolloutApi, RolloutListing
from fedtide.coordinator.api.routes import Route
from fedtide.coordinator.api.runs import RunApi, RunListing
from fedtide.coordinator.api.storage import StorageApi
from fedtide.coordinator.api.triggers import TriggerApi
from fedtide.coordinator.api.trust import TrustApi
from fedtide.coordinator.page.curves import HEIGHT, WIDTH, Curve, curve
from fedtide.coordinator.page.lineage import lineage
from fedtide.coordinator.page.session import Session
from fedtide.coordinator.page.sick import sick
from fedtide.coordinator.page.words import FILTERS
from fedtide.coordinator.rollouts.rollouts import Paused
from fedtide.coordinator.runs.runs import Ended
from fedtide.coordinator.state import World
from fedtide.fabric.errors import FedtideError, NotFound
from fedtide.fabric.messages.views import RUN_ENDED, RunView
from fedtide.fabric.strict import Strict

V = TypeVar("V")
HERE = Path(__file__).parent
PER_PAGE, NUMBERED_SHOWN, EVENTS_SHOWN, SICK_SHOWN = 100, 50, 100, 20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SCREENS = (
    ("", "Overview"),
    ("fleet", "Fleet"),
    ("runs", "Runs"),
    ("rollouts", "Roll-outs"),
    ("models", "Models"),
    ("triggers", "Triggers"),
    ("costs", "Costs"),
    ("events", "Events"),
    ("health", "Health"),
)
ACTIONS: Mapping[str, tuple[str, ...]] = {
    "running": ("pause", "stop", "cancel"),
    "starting": ("pause", "cancel"),
    "paused": ("resume", "cancel"),
    "rolling": ("pause", "abort"),
}
"""What a person may do with a run or roll-out in each state; the API says what it does not allow."""


@dataclass(frozen=True, slots=True)
class Apis:
    """What the page shows."""

    models: ModelApi
    fleet: FleetApi
    runs: RunApi
    rollouts: RolloutApi
    triggers: TriggerApi
    events: EventApi
    identity: IdentityApi
    storage: StorageApi
    costs: CostApi
    trust: TrustApi
    people: PeopleApi
    audit: AuditApi

    def routes(self) -> list[list[Route]]:
        """Of all of them."""
        return [getattr(self, each.name).routes() for each in fields(self)]


class CostChoice(Strict):
    by: str = "model"
    where: str = ""
    days: int = Field(default=7, ge=1, le=36_500)
    skip: int = Field(default=0, ge=0)


class Skip(Strict):
    skip: int = Field(default=0, ge=0)


class Before(Strict):
    before: int | None = Field(default=None, description="Only what is older than this round or version")


class Page:
    """Handlers of the screens."""

    def __init__(self, apis: Apis, world: Callable[[], World], session: Session) -> None:
        """`world`: gives the coordinator's state as it is now."""
        self._apis = apis
        self._world = world
        self._session = session
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters |= FILTERS

    def add_to(self, app: web.Application) -> None:
        """Serve the page below `/ui/`."""
        screens = {
            "": self._overview,
            "fleet": self._fleet,
            "fleet/{node}": self._node,
            "runs": self._runs,
            "runs/{run}": self._run,
            "rollouts": self._rollouts,
            "rollouts/{rollout}": self._rollout,
            "models": self._models,
            "models/{model}": self._model,
            "triggers": self._triggers,
            "costs": self._costs,
            "events": self._events,
            "health": self._health,
            "login": self._login,
        }
        app.router.add_get("/", self._to_page)
        app.router.add_get("/ui", self._to_page)
        for path, screen in screens.items():
            app.router.add_get(f"/ui/{path}", self._guarded(screen))
        app.router.add_post("/ui/login", self._open)
        app.router.add_get("/ui/oidc", self._begin)
        app.router.add_get("/ui/oidc/callback", self._end)
        app.router.add_static("/ui/static", HERE / "static")

    async def _to_page(self, request: web.Request) -> web.Response:
        # Relative, and without the last slash's meaning: the page may be behind a path prefix.
        raise web.HTTPFound("ui/")

    def _guarded(self, screen: Any) -> Any:
        """Errors are told on the page, not as problem documents."""

        async def handle(request: web.Request) -> web.Response:
            try:
                found: web.Response = await screen(request)
                return found
            except FedtideError as exc:
                status = 404 if isinstance(exc, NotFound) else 400
                return self._show(request, "problem", status=status, what=exc.what, remedy=exc.remedy)

        return handle

    def _show(self, request: web.Request, name: str, *, status: int = 200, **values: Any) -> web.Response:
        depth = local_path(request).removeprefix("/ui/").count("/")
        context = {
            "root": "../" * depth or "./",
            "api": "../" * (depth + 1),
            "screens": SCREENS,
            "screen": local_path(request).removeprefix("/ui/").partition("/")[0],
            "query": dict(request.query),
            "now": datetime.now(UTC),
            "command": "",
            **values,
        }
        text = self._templates.get_template(f"{name}.html").render(context)
        return web.Response(text=text, status=status, content_type="text/html", headers=HEADERS)

    async def _login(self, request: web.Request) -> web.Response:
        return self._show(
            request,
            "login",
            wrong="wrong" in request.query,
            large="large" in request.query,
            has_login=self._session.has_login,
        )

    async def _open(self, request: web.Request) -> web.Response:
        sent = await request.post()
        raise await self._session.opened(request, str(sent.get("token", "")).strip())

    async def _begin(self, request: web.Request) -> web.Response:
        raise await self._session.begin(request)

    async def _end(self, request: web.Request) -> web.Response:
        raise await self._session.end(request)

    async def _overview(self, request: web.Request) -> web.Response:
        apis, world = self._apis, self._world()
        week = await apis.costs.costs(CostQuery(since=datetime.now(UTC) - timedelta(days=7)))
        rollouts = [view for key in _newest(world.rollouts) if (view := apis.rollouts.view(key)).state != "superseded"]
        stopped = [apis.rollouts.view(key) for key, each in world.rollouts.items() if isinstance(each, Paused)]
        stopped += [view for view in rollouts if view.state == "rolledback"]
        failed = [key for key in _newest(world.runs) if _has_failed(world, key)]
        budgets = [view for view in apis.costs.budgets(Listing(limit=1000)).items if view.holds]
        active = [key for key, _ in world.active_runs()]
        return self._show(
            request,
            "overview",
            status_view=apis.models.status(),
            week=week,
            regions=apis.identity.regions(Listing(limit=PER_PAGE)),
            runs=[(apis.runs.view(key, rounds_too=False), len(world.runs[key].rounds)) for key in active[-10:]],
            rollouts=rollouts[:5],
            stopped=stopped,
            held=budgets,
            failed=[apis.runs.view(key, rounds_too=False) for key in failed[:5]],
            sick=sick(world, apis.fleet.warned()),
            shown=SICK_SHOWN,
            command="fedtide status",
        )

    async def _fleet(self, request: web.Request) -> web.Response:
        query = query_of(request, NodeListing)
        page = self._apis.fleet.page(query.model_copy(update={"limit": PER_PAGE}))
        regions = self._apis.identity.regions(Listing(limit=1000))
        return self._show(
            request, "fleet", page=page, regions=regions, more=_more(request, page.next), command="fedtide fleet ls"
        )

    async def _node(self, request: web.Request) -> web.Response:
        name = request.match_info["node"]
        view, why = self._apis.fleet.view(name), await self._apis.events.why(name, WhyOptions(limit=20))
        return self._show(request, "node", node=view, why=why, command=f"fedtide why {name}")

    async def _runs(self, request: web.Request) -> web.Response:
        query = query_of(request, RunListing).model_copy(update={"limit": PER_PAGE})
        page, world = self._apis.runs.page(query, rounds_too=False), self._world()
        rounds = {view.run: len(world.runs[view.run].rounds) for view in page.items}
        more = _more(request, page.next)
        return self._show(request, "runs", page=page, rounds=rounds, more=more, command="fedtide run ls")

    async def _run(self, request: web.Request) -> web.Response:
        key, asked = request.match_info["run"], query_of(request, Before)
        view = self._apis.runs.view(key)
        rounds, before = _before(view.rounds[::-1], asked.before, lambda each: each.round)
        cost = await self._apis.costs.costs(CostQuery(by="phase,outcome", where=f"run={key}"))
        return self._show(
            request,
            "run",
            run=view,
            cost=cost,
            curves=_curves(view),
            width=WIDTH,
            height=HEIGHT,
            rounds=rounds,
            before=before,
            actions=() if view.state in RUN_ENDED else ACTIONS.get(view.state, ()),
            command=f"fedtide run show {key}",
        )

    async def _rollouts(self, request: web.Request) -> web.Response:
        query = query_of(request, RolloutListing).model_copy(update={"limit": PER_PAGE})
        page = self._apis.rollouts.page(query)
        return self._show(request, "rollouts", page=page, more=_more(request, page.next), command="fedtide rollout ls")

    async def _rollout(self, request: web.Request) -> web.Response:
        key = request.match_info["rollout"]
        view = self._apis.rollouts.view(key)
        actions = ("resume", "abort", "rollback") if view.state == "paused" else ACTIONS.get(view.state, ())
        actions = ("rollback",) if view.state == "completed" else actions
        return self._show(request, "rollout", rollout=view, actions=actions, command=f"fedtide rollout show {key}")

    async def _models(self, request: web.Request) -> web.Response:
        page = self._apis.models.page(query_of(request, Listing).model_copy(update={"limit": PER_PAGE}))
        return self._show(request, "models", page=page, more=_more(request, page.next), command="fedtide model ls")

    async def _model(self, request: web.Request) -> web.Response:
        name, asked = request.match_info["model"], query_of(request, Before)
        view = self._apis.models.view(name)
        versions = {r.digest: r.version for r in view.releases}
        releases, before = _before(view.releases[::-1], asked.before, lambda release: release.version)
        bases = {r.version: versions[b.digest] for r in releases if (b := r.lineage.base) and b.digest in versions}
        return self._show(
            request,
            "model",
            model=view,
            releases=releases,
            before=before,
            versions=versions,
            drawing=lineage([release.version for release in releases], bases),
            served=self._world().served_by(name),
            command=f"fedtide model show {name}",
        )

    async def _triggers(self, request: web.Request) -> web.Response:
        page = self._apis.triggers.page(query_of(request, Listing).model_copy(update={"limit": PER_PAGE}))
        return self._show(request, "triggers", page=page, more=_more(request, page.next), command="fedtide trigger ls")

    async def _costs(self, request: web.Request) -> web.Response:
        asked = query_of(request, CostChoice)
        since = datetime.now(UTC) - timedelta(days=asked.days)
        view = await self._apis.costs.costs(CostQuery(by=asked.by, where=asked.where, since=since))
        where = f" --where {asked.where}" if asked.where else ""
        return self._show(
            request,
            "costs",
            view=view,
            asked=asked,
            choices=("model", "region", "phase", "outcome", "run", "release", "by", "pool", "meter", "day", "app"),
            rows=view.rows[asked.skip : asked.skip + PER_PAGE],
            more=_next(request, asked.skip, len(view.rows)),
            total=view.total.cost or 1,
            budgets=self._apis.costs.budgets(Listing(limit=PER_PAGE)),
            command=f"fedtide cost --by {asked.by or '-'} --since {asked.days}d{where}",
        )

    async def _events(self, request: web.Request) -> web.Response:
        query = query_of(request, EventListing).model_copy(update={"limit": EVENTS_SHOWN})
        page = await self._apis.events.page(query)
        return self._show(
            request, "events", events=page.items[::-1], more=_more(request, page.next), command="fedtide events ls"
        )

    async def _health(self, request: web.Request) -> web.Response:
        storage = await self._apis.storage.storage()
        fullest = sorted(storage.streams, key=lambda each: -(each.size_bytes / each.max_bytes if each.max_bytes else 0))
        asked, found = query_of(request, Skip), sick(self._world(), self._apis.fleet.warned())
        return self._show(
            request,
            "health",
            streams=fullest[:PER_PAGE],
            all_streams=len(fullest),
            status_view=self._apis.models.status(),
            sick=found[asked.skip : asked.skip + PER_PAGE],
            all_sick=len(found),
            more=_next(request, asked.skip, len(found)),
            command="fedtide storage",
        )


def _has_failed(world: World, key: str) -> bool:
    run = world.runs[key]
    return isinstance(run, Ended) and run.outcome == "failed"


def _newest(table: Mapping[str, Any]) -> list[str]:
    return list(table)[-20:][::-1]


def _curves(run: RunView) -> list[Curve]:
    names = list(dict.fromkeys(name for each in run.rounds for name in each.metrics))
    found = (curve(name, [(r.round, r.metrics.get(name)) for r in run.rounds]) for name in names[:12])
    return [each for each in found if each is not None]


def _before(newest_first: list[V], before: int | None, number: Callable[[V], int]) -> tuple[list[V], int | None]:
    """One page of what has numbers, and before which number the next one is; None: this was the last."""
    found = [each for each in newest_first if before is None or number(each) < before]
    shown = found[:NUMBERED_SHOWN]
    return shown, number(shown[-1]) if len(found) > len(shown) else None


def _next(request: web.Request, skip: int, total: int) -> str:
    """As `_more`, of what has no names to go on from."""
    return urlencode({**request.query, "skip": skip + PER_PAGE}) if skip + PER_PAGE < total else ""


def _more(request: web.Request, after: str) -> str:
    """The query of the next page; empty: this was the last."""
    return urlencode({**request.query, "after": after}) if after else ""
