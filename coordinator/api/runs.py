"""The API of runs: start, look at, and a person's actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from aiohttp import web
from pydantic import AwareDatetime, Field

from fedtide.coordinator.adapters.node_questions import NodeQuestions
from fedtide.coordinator.adapters.presence import Presence
from fedtide.coordinator.adapters.run_logs import RunLogs
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
from fedtide.coordinator.api.routes import LINES, Route, delete, each, get, post
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.runs import runs, selection, views
from fedtide.fabric.errors import Conflict, InvalidTransition
from fedtide.fabric.events.runs import (
    RunCancelRequested,
    RunPauseRequested,
    RunRemoved,
    RunResumeRequested,
    RunStopRequested,
)
from fedtide.fabric.messages.logs import LogPage, LogQuestion
from fedtide.fabric.messages.requests import ActionRequest, RunActionName
from fedtide.fabric.messages.views import Page, RunState, RunView
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.strict import Strict

Asked = RunCancelRequested | RunPauseRequested | RunResumeRequested | RunStopRequested
_ACTIONS: Mapping[RunActionName, Callable[[str, ActionRequest], Asked]] = {
    "cancel": lambda key, asked: RunCancelRequested(run=key, reason=asked.reason),
    "pause": lambda key, asked: RunPauseRequested(run=key, reason=asked.reason),
    "resume": lambda key, _: RunResumeRequested(run=key),
    "stop": lambda key, asked: RunStopRequested(run=key, reason=asked.reason),
}


class RunListing(Listing):
    state: RunState | Literal[""] = ""
    model: str = ""
    app: str = ""


class LogOptions(Strict):
    node: str = Field(default="", max_length=100, description="Empty: the ServerApp")
    after: AwareDatetime | None = None
    timeout_s: float = Field(default=15.0, gt=0, le=300, allow_inf_nan=False)


class RunApi:
    """Handlers over the engine's runs."""

    def __init__(
        self, engine: Engine, presence: Presence, starter: Starter, logs: RunLogs, questions: NodeQuestions
    ) -> None:
        self._engine = engine
        self._logs = logs
        self._questions = questions
        self._presence = presence
        self._starter = starter

    def routes(self) -> list[Route]:
        return [
            get("/v1/runs", self._all, "Runs", Page[RunView], query=RunListing),
            post("/v1/runs", self._start, "Start a run", RunView, body=RunRequest, status=201),
            get("/v1/runs/{run}", self._one, "One run with its rounds", RunView),
            get("/v1/runs/{run}/logs", self._logs_of, "What the app has printed", LogPage, query=LogOptions),
            delete("/v1/runs/{run}", self._remove, "Forget a run that has ended", RunView),
            get("/v1/runs/{run}/watch", self._watch, "A run as it changes", RunView, media=LINES),
            *each(
                post("/v1/runs/{run}/<action>", self._one, "<action> a run", RunView, body=ActionRequest),
                "action",
                {action: partial(self._act, action) for action in _ACTIONS},
            ),
        ]

    def view(self, key: str, *, rounds_too: bool = True) -> RunView:
        """`rounds_too`: with its rounds, of which each names all its nodes."""
        world = self._engine.world
        state, release = world.run(key), world.release_of(key)
        return views.run(
            state,
            publishing=world.is_publishing(key),
            version=release.manifest.version if release is not None else None,
            matching=lambda: sum(selection.why_not(n, state.facts.spec) is None for n in world.nodes.values()),
            doing=lambda node: views.doing(key, world.nodes.get(node), self._presence.heartbeats.get(node)),
            rounds_too=rounds_too,
        )

    def _state(self, key: str) -> RunState:
        world = self._engine.world
        return views.run_state(world.run(key), publishing=world.is_publishing(key))

    async def _all(self, request: web.Request) -> web.Response:
        return answer(self.page(query_of(request, RunListing)))

    def page(self, query: RunListing, *, rounds_too: bool = True) -> Page[RunView]:
        matching = [
            key
            for key, run in self._engine.world.runs.items()
            if query.model in ("", run.facts.spec.model)
            and query.app in ("", run.facts.spec.app.name)
            and query.state in ("", self._state(key))
        ]
        return page_of(query, matching, partial(self.view, rounds_too=rounds_too))

    async def _start(self, request: web.Request) -> web.Response:
        key, asked = key_of(request, "run"), await read_body(request, RunRequest)
        if key not in self._engine.world.runs:
            await self._starter.run(key, asked, asker(request), trace=trace_of(request))
        return answer(self.view(key), status=201)

    async def _one(self, request: web.Request) -> web.Response:
        return answer(self.view(name_in(request, "run")))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        key, world = name_in(request, "run"), self._engine.world
        world.run(key)

        def over() -> bool:
            return isinstance(world.runs[key], runs.Ended) and not world.is_publishing(key)

        return await stream(self._engine, request, lambda: self.view(key), over)

    async def _logs_of(self, request: web.Request) -> web.Response:
        """What the ServerApp has printed, or the ClientApp on one node."""
        key, asked = name_in(request, "run"), query_of(request, LogOptions)
        state = self._engine.world.run(key)
        if not asked.node:
            return answer(await self._logs.page(state.facts.run, asked.after))
        node = self._engine.world.node(asked.node)
        return answer(await self._questions.logs(node, key, LogQuestion(after=asked.after), asked.timeout_s))

    async def _remove(self, request: web.Request) -> web.Response:
        """Forget a run that has ended; what was stored for it is swept."""
        key = name_in(request, "run")
        state, removed = self._engine.world.run(key), self.view(key)
        if not isinstance(state, runs.Ended) or not state.cleaned or self._engine.world.is_publishing(key):
            raise Conflict(f"run {key} is {removed.state}", f"End it first: fedtide run cancel {key}")
        await self._engine.submit(RunRemoved(run=key))
        return answer(removed)

    async def _act(self, action: RunActionName, request: web.Request) -> web.Response:
        key = name_in(request, "run")
        asked = await read_body(request, ActionRequest)
        state = self._engine.world.run(key)
        if (reason := runs.why_not_allowed(state, action, datetime.now(UTC))) is not None:
            raise Conflict(f"run {key} {reason}", f"See `fedtide run show {key}`")
        if not runs.is_done(state, action):
            try:
                await self._engine.submit(_ACTIONS[action](key, asked))
            except InvalidTransition as exc:
                raise Conflict(exc.what, exc.remedy) from exc
        return answer(self.view(key))
