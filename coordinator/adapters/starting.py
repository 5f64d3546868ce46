"""Starting runs and roll-outs, whoever asks: a person through the API, or a trigger rule."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from pydantic import ValidationError

from fedtide.coordinator.adapters import tracking
from fedtide.coordinator.adapters.director import Director
from fedtide.coordinator.adapters.run_models import RunModels
from fedtide.coordinator.config import TrackingRules
from fedtide.coordinator.fleet import fleet
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.rollouts.planning import check_expressions, plan
from fedtide.coordinator.runs.selection import why_not_packages
from fedtide.coordinator.state import World
from fedtide.fabric.errors import ConfigError, NotFound
from fedtide.fabric.events.rollouts import RolloutRetryRequested, RolloutStarted
from fedtide.fabric.events.runs import RunRequested
from fedtide.fabric.ids import check_token
from fedtide.fabric.plans.rollout_plan import QueryGate, RolloutPlan
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.run_spec import AppRef, RunRequest, RunSpec
from fedtide.fabric.plans.tracking import Tracking
from fedtide.fabric.plans.trigger_rule import Notify, StartRollout, TriggerRule
from fedtide.fabric.strict import ConfigValues
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.validation import config_error

_ANYWHERE = TrackingRules()
_NO_PROMETHEUS = "Name the servers that gates may ask in the coordinator's `prometheus`"


class Starter:
    """Turns requests into the events that start something. An id that exists already changes nothing."""

    def __init__(
        self,
        engine: Engine,
        models: RunModels,
        tracking_rules: TrackingRules = _ANYWHERE,
        prometheus: Collection[str] = (),
        director: Director | None = None,
    ) -> None:
        """`prometheus`: names of the servers that gates may ask. `director`: knows whose apps nodes train."""
        self._director = director
        self._prometheus = prometheus
        self._tracking = tracking_rules
        self._engine = engine
        self._models = models
        self._planning = asyncio.Lock()

    async def run(self, key: str, asked: RunRequest, by: str, cause: str = "", trace: str = "") -> None:
        """Request a run under the id `key`.

        Args:
            by: who or what asks.
            cause: the event that led to it.
            trace: the W3C traceparent of whoever asks, if there is one.

        Raises:
            ConfigError, NotFound: the request names something that does not exist.
        """
        world = self._engine.world
        check_selector(world, asked.selector)
        if asked.model is not None:
            check_token("model", asked.model)
        config = asked.run_config or _config_of(world, asked)
        start = await self._start_of(asked)
        base = _base(world, asked) if start is None else None
        asked = asked.model_copy(update={"track": asked.track or _track_of(world, asked)})
        spec = asked.resolved(asked.app or _app_of(world, asked), base, config, start)
        if self._director is not None:
            self._director.check_app(spec.app)
        _check_packages(world, spec)
        tracking.check(spec.track, self._tracking)
        if spec.purpose == "evaluate" and spec.base is None:
            raise ConfigError("base", "is missing: an evaluation needs a release", "Name a version, or latest")
        requested = RunRequested(run=key, spec=spec, by=by, cause=cause, trace=trace)
        await self._engine.submit(requested, id=f"{key}.requested")

    async def _start_of(self, asked: RunRequest) -> BlobRef | None:
        """The model to start from, if that is of a run that has made no release."""
        run, _, number = (asked.base or "").partition("/")
        if run not in self._engine.world.runs or (not number and self._engine.world.release_of(run) is not None):
            return None
        if number and not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise ConfigError("base", f"{asked.base!r} names no round", "Write RUN/ROUND")
        return await self._models.model(run, int(number) if number else None)

    async def rollout(self, key: str, asked: RolloutRequest, by: str, trace: str = "") -> None:
        """Start a roll-out under the id `key`; `trace` as for a run.

        Raises:
            ConfigError, NotFound: no such release, region or cohort.
        """
        async with self._planning:  # two at once would be given the same counter
            counter = self._engine.world.model(asked.model).counter + 1
            started = RolloutStarted(rollout=key, plan=self.plan(asked), counter=counter, by=by, trace=trace)
            await self._engine.submit(started, id=f"{key}.started")

    def plan(self, asked: RolloutRequest) -> RolloutPlan:
        """What a roll-out would do.

        Raises:
            ConfigError, NotFound: as `rollout`.
        """
        world = self._engine.world
        model = world.model(asked.model)
        for number, gate in enumerate(asked.gates):
            if isinstance(gate, QueryGate) and gate.source not in self._prometheus:
                known = f"Known: {', '.join(sorted(self._prometheus))}" if self._prometheus else _NO_PROMETHEUS
                raise ConfigError(f"gates.{number}.source", f"the coordinator knows no {gate.source!r}", known)
        planned = plan(asked, model, world.members(), world.serving.get(model.name, {}))
        if world.trust.is_used and world.attestation_of(planned.release) is None:
            raise ConfigError(
                "version",
                f"{planned.model}@{planned.version} is signed by nobody: no node would serve it",
                f"fedtide model sign {planned.model} {planned.version} --key KEY",
            )
        return planned

    async def retry(self, key: str, by: str) -> None:
        """Offer a roll-out's release again to nodes that failed, under a counter of its own."""
        async with self._planning:
            world = self._engine.world
            counter = world.model(world.rollout(key).facts.plan.model).counter + 1
            await self._engine.submit(RolloutRetryRequested(rollout=key, counter=counter, by=by))

    async def fire(self, rule: TriggerRule, key: str, cause: str, trace: str) -> None:
        """Start what a rule says, unless `key` exists already. `cause`, `trace`: of the event that fired it."""
        by, do = f"trigger {rule.name}", rule.do
        if isinstance(do, StartRollout):
            if key not in self._engine.world.rollouts:
                await self.rollout(key, rollout_request(do), by, trace)
        elif not isinstance(do, Notify) and key not in self._engine.world.runs:
            await self.run(key, do.request(), by, cause, trace)


def rollout_request(do: StartRollout) -> RolloutRequest:
    """Raises ConfigError naming the field of the plan that is wrong."""
    try:
        asked = do.request()
    except ValidationError as exc:
        raise config_error(exc, RolloutRequest, "do.plan") from exc
    check_expressions(asked)
    return asked


def check_selector(world: World, selector: dict[str, str]) -> None:
    """Raises NotFound if the selector cannot match: an unknown region or node, or labels that no node has."""
    nodes = world.members()
    for label in ("region", "node"):
        wanted = selector.get(label)
        known = {n.labels[label] for n in nodes}
        for value in wanted.split("|") if wanted is not None else []:
            if value not in known:
                raise NotFound(f"there is no {label} {value!r}", f"Known: {', '.join(sorted(known)) or 'none yet'}")
    if not any(fleet.matches(n, selector) for n in nodes):
        raise NotFound(f"no node has the labels {selector}", "See `fedtide fleet ls -o yaml`")


def _check_packages(world: World, spec: RunSpec) -> None:
    """Raises ConfigError if no node has, or may get, what the app needs."""
    nodes = [n for n in world.members() if fleet.matches(n, spec.selector)]
    reasons = {n.name: why_not_packages(n.capabilities, spec.app) for n in nodes}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        others = f" (nor has any of the {len(nodes) - 1} others)" if len(nodes) > 1 else ""
        raise ConfigError(
            "app",
            f"no node can run it: {name} {reason}{others}",
            "Send the wheels along (--with-wheels), let nodes use an index (packages.index; `fedtide up --app-index`), "
            "or install it there",
        )


def _app_of(world: World, asked: RunRequest) -> AppRef:
    latest = world.model(asked.model).latest if asked.model is not None else None
    if latest is None:
        raise ConfigError("app", "is missing, and there is no release whose app could be taken", "Name an app")
    return latest.manifest.lineage.app


def _config_of(world: World, asked: RunRequest) -> ConfigValues:
    """An app that is taken from a release keeps the configuration that it was run with."""
    latest = world.model(asked.model).latest if asked.app is None and asked.model is not None else None
    return latest.manifest.lineage.run_config if latest is not None else {}


def _track_of(world: World, asked: RunRequest) -> Tracking | None:
    """An app that is taken from a release is reported where the run was that made it, if that is known."""
    latest = world.model(asked.model).latest if asked.app is None and asked.model is not None else None
    run = world.runs.get(latest.manifest.lineage.run) if latest is not None else None
    return run.facts.spec.track if run is not None else None


def _base(world: World, asked: RunRequest) -> BlobRef | None:
    if asked.base is None:
        return None
    if (of_run := world.release_of(asked.base) if asked.base in world.runs else None) is not None:
        return of_run.ref
    if asked.model is None:
        raise ConfigError("base", "needs a model", "Name the model that the base release belongs to")
    releases = world.models[asked.model].releases if asked.model in world.models else ()
    moving = asked.base in ("latest", "served")
    if moving and asked.app is not None and asked.purpose == "train" and not releases:
        return None  # the first run of a rule that then goes on from what there is
    served = world.served_by_most(asked.model) if asked.base == "served" and releases else None
    if served is not None:
        return served.ref
    wanted = str(len(releases)) if moving else asked.base
    for release in releases:
        if str(release.manifest.version) == wanted:
            return release.ref
    world.model(asked.model)
    raise NotFound(f"model {asked.model!r} has no release {asked.base}", "See `fedtide model ls`")
