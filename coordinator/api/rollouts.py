"""The API of roll-outs: plan, start, look at, and a person's wishes."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from pydantic import Field

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.adapters.starting import Starter
from fedtide.coordinator.api.http_api import key_of, read_body, stream
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.rollouts import rollouts
from fedtide.coordinator.rollouts import views as rollout_views
from fedtide.coordinator.rollouts.planning import RolloutRequest
from fedtide.coordinator.runs.views import View
from fedtide.fabric.errors import ConfigError, InvalidTransition
from fedtide.fabric.events.envelope import EventData
from fedtide.fabric.events.rollouts import (
    RolloutAbortRequested,
    RolloutNextRequested,
    RolloutPauseRequested,
    RolloutPromoteRequested,
    RolloutResumeRequested,
    RolloutRollbackRequested,
)
from fedtide.fabric.messages.tasks import Strict
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.subjects import RELEASES, Subjects
from fedtide.fabric.nats.transfer import Source, read_blob
from fedtide.fabric.plans.release import decode_release


class WishRequest(Strict):
    """`reason` is shown to whoever looks; `region` means every region if empty."""

    reason: str = "asked by a person"
    region: str = Field(default="", description="Of a promotion")


WISHES: dict[str, Callable[[str, WishRequest], EventData]] = {
    "abort": lambda key, asked: RolloutAbortRequested(rollout=key, reason=asked.reason),
    "rollback": lambda key, asked: RolloutRollbackRequested(rollout=key, reason=asked.reason),
    "pause": lambda key, asked: RolloutPauseRequested(rollout=key, reason=asked.reason),
    "resume": lambda key, _: RolloutResumeRequested(rollout=key),
    "promote": lambda key, asked: RolloutPromoteRequested(rollout=key, region=asked.region),
    "next": lambda key, _: RolloutNextRequested(rollout=key),
}


class RolloutApi:
    """Handlers over the engine's roll-outs."""

    def __init__(self, broker: Broker, subjects: Subjects, engine: Engine, starter: Starter) -> None:
        self._broker = broker
        self._subjects = subjects
        self._engine = engine
        self._starter = starter

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/rollouts", self._all),
            web.post("/v1/rollouts", self._start),
            web.post("/v1/rollouts/plan", self._plan),
            web.get("/v1/rollouts/{rollout}", self._one),
            web.get("/v1/rollouts/{rollout}/watch", self._watch),
            web.post("/v1/rollouts/{rollout}/{wish}", self._wish),
        ]

    def _view(self, key: str) -> View:
        return rollout_views.rollout(self._engine.world.rollout(key))

    async def _all(self, _: web.Request) -> web.Response:
        return web.json_response([self._view(key) for key in self._engine.world.rollouts])

    async def _start(self, request: web.Request) -> web.Response:
        key = key_of(request, "rollout")
        if key not in self._engine.world.rollouts:
            await self._starter.rollout(key, await read_body(request, RolloutRequest), "cli")
        return web.json_response(self._view(key), status=201)

    async def _plan(self, request: web.Request) -> web.Response:
        world = self._engine.world
        planned = self._starter.plan(await read_body(request, RolloutRequest))
        distribution = Distribution(self._broker, self._subjects)
        wan = {w.region: await distribution.missing_bytes(w.region, planned.release) for w in planned.waves}
        raw = await read_blob(Source(self._broker, RELEASES), self._subjects.release_blob, planned.release)
        size = planned.release.size_bytes + sum(ref.size_bytes for ref in decode_release(bytes(raw)).served)
        offline = frozenset(n.name for n in world.nodes.values() if not n.online)
        return web.json_response(rollout_views.planned(planned, wan, size, offline))

    async def _one(self, request: web.Request) -> web.Response:
        return web.json_response(self._view(request.match_info["rollout"]))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        key, world = request.match_info["rollout"], self._engine.world
        world.rollout(key)
        stays = "through_pauses" in request.query

        def over() -> bool:
            state = world.rollouts[key]
            if isinstance(state, rollouts.RolledBack):
                waiting = rollouts.holders(state) - state.restored - state.stuck.keys()
                return not any(world.nodes[n].online for n in waiting)
            return not (isinstance(state, rollouts.Rolling) or (stays and isinstance(state, rollouts.Paused)))

        return await stream(self._engine, request, lambda: self._view(key), over)

    async def _wish(self, request: web.Request) -> web.Response:
        key, wish = request.match_info["rollout"], request.match_info["wish"]
        self._engine.world.rollout(key)
        asked = await read_body(request, WishRequest)
        try:
            if wish == "retry":
                await self._starter.retry(key)
            elif wish in WISHES:
                await self._engine.submit(WISHES[wish](key, asked))
            else:
                raise ConfigError(wish, "is no wish", f"Use one of {', '.join([*WISHES, 'retry'])}")
        except InvalidTransition as exc:
            raise ConfigError(wish, str(exc), f"See `fedtide rollout get {key}`") from exc
        return web.json_response(self._view(key))
