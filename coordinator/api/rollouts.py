"""The API of roll-outs: plan, start, look at, and a person's actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.api.http import (
    Listing,
    answer,
    asker,
    key_of,
    name_in,
    page_of,
    query_of,
    read_body,
    stream,
    trace_of,
)
from fedtide.coordinator.api.routes import LINES, Route, each, get, post
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.rollouts import rollouts, views
from fedtide.fabric.errors import Conflict, InvalidTransition
from fedtide.fabric.events.rollouts import (
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRollbackRequested,
)
from fedtide.fabric.messages.requests import ActionRequest, RolloutActionName
from fedtide.fabric.messages.views import Page, PlannedRollout, RolloutState, RolloutView
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import RELEASES, Subjects
from fedtide.fabric.nats.transfer import Source, read_blob
from fedtide.fabric.plans.release import decode_release
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.strict import Strict

Asked = (
    RolloutAbortRequested
    | RolloutRollbackRequested
    | RolloutPauseRequested
    | RolloutResumeRequested
    | RolloutPromoteRequested
    | RolloutNextRequested
)
_EVENTS: Mapping[RolloutActionName, Callable[[str, ActionRequest, str], Asked]] = {
    "abort": lambda key, asked, _: RolloutAbortRequested(rollout=key, reason=asked.reason),
    "rollback": lambda key, asked, _: RolloutRollbackRequested(rollout=key, reason=asked.reason),
    "pause": lambda key, asked, _: RolloutPauseRequested(rollout=key, reason=asked.reason),
    "resume": lambda key, _, by: RolloutResumeRequested(rollout=key, by=by),
    "promote": lambda key, asked, by: RolloutPromoteRequested(rollout=key, region=asked.region, by=by),
    "next": lambda key, _, by: RolloutNextRequested(rollout=key, by=by),
}


class RolloutListing(Listing):
    state: RolloutState | Literal[""] = ""
    model: str = ""


class WatchOptions(Strict):
    through_pauses: bool = Field(default=False, description="A pause does not end the stream")


class RolloutApi:
    """Handlers over the engine's roll-outs."""

    def __init__(self, broker: Broker, subjects: Subjects, engine: Engine, starter: Starter) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._starter = starter

    def routes(self) -> list[Route]:
        return [
            get("/v1/rollouts", self._all, "Roll-outs", Page[RolloutView], query=RolloutListing),
            post("/v1/rollouts", self._start, "Start a roll-out", RolloutView, body=RolloutRequest, status=201),
            post(
                "/v1/rollouts/plan",
                self._plan,
                "What a roll-out would do",
                PlannedRollout,
                body=RolloutRequest,
                needs="viewer",
            ),
            get("/v1/rollouts/{rollout}", self._one, "One roll-out", RolloutView),
            get(
                "/v1/rollouts/{rollout}/watch",
                self._watch,
                "A roll-out as it changes",
                RolloutView,
                query=WatchOptions,
                media=LINES,
            ),
            *each(
                post(
                    "/v1/rollouts/{rollout}/<action>", self._one, "<action> a roll-out", RolloutView, body=ActionRequest
                ),
                "action",
                {action: partial(self._act, action) for action in (*_EVENTS, "retry")},
            ),
        ]

    def view(self, key: str) -> RolloutView:
        return views.rollout(self._engine.world.rollout(key))

    async def _all(self, request: web.Request) -> web.Response:
        return answer(self.page(query_of(request, RolloutListing)))

    def page(self, query: RolloutListing) -> Page[RolloutView]:
        matching = [
            key
            for key, rollout in self._engine.world.rollouts.items()
            if query.model in ("", rollout.facts.plan.model) and query.state in ("", rollouts.state_name(rollout))
        ]
        return page_of(query, matching, self.view)

    async def _start(self, request: web.Request) -> web.Response:
        key, asked = key_of(request, "rollout"), await read_body(request, RolloutRequest)
        if key not in self._engine.world.rollouts:
            await self._starter.rollout(key, asked, asker(request), trace_of(request))
        return answer(self.view(key), status=201)

    async def _plan(self, request: web.Request) -> web.Response:
        world = self._engine.world
        planned = self._starter.plan(await read_body(request, RolloutRequest))
        distribution = Distribution(self._broker, self._subjects)
        wan = {w.region: await distribution.missing_bytes(w.region, planned.release) for w in planned.waves}
        raw = await read_blob(Source(self._broker, RELEASES), self._subjects.release_blob, planned.release)
        size = planned.release.size_bytes + sum(ref.size_bytes for ref in decode_release(bytes(raw)).served)
        offline = frozenset(n.name for n in world.nodes.values() if not n.online)
        return answer(views.planned(planned, wan, size, offline))

    async def _one(self, request: web.Request) -> web.Response:
        return answer(self.view(name_in(request, "rollout")))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        key, world = name_in(request, "rollout"), self._engine.world
        world.rollout(key)
        stays = query_of(request, WatchOptions).through_pauses

        def over() -> bool:
            state = world.rollouts[key]
            if isinstance(state, rollouts.RolledBack):
                waiting = rollouts.holders(state) - state.restored - state.stuck.keys()
                return not any(world.nodes[n].online for n in waiting)
            return not (isinstance(state, rollouts.Rolling) or (stays and isinstance(state, rollouts.Paused)))

        return await stream(self._engine, request, lambda: self.view(key), over)

    async def _act(self, action: RolloutActionName, request: web.Request) -> web.Response:
        key = name_in(request, "rollout")
        self._engine.world.rollout(key)
        asked = await read_body(request, ActionRequest)
        try:
            if action == "retry":
                await self._starter.retry(key, asker(request))
            else:
                await self._engine.submit(_EVENTS[action](key, asked, asker(request)))
        except InvalidTransition as exc:
            raise Conflict(exc.what, f"See `fedtide rollout show {key}`") from exc
        return answer(self.view(key))
