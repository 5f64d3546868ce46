"""Runs in MLflow and TensorBoard: each that asks for it is reported as it goes, and with its results when it has ended.

What is reported is the run as a whole, whenever it has changed: a report that failed, or a coordinator that came back,
makes up for what is missing. A tracker that is away holds up nothing but its own reports.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.config import TrackingRules
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.runs import rounds, runs, views
from fedtide.coordinator.tracking.record import RunRecord, TrackedRound
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.events.envelope import Event, ReleasePublished
from fedtide.fabric.plans.tracking import Tracking
from fedtide.fabric.process.parent_death import die_with_parent
from fedtide.fabric.process.python import module_command
from fedtide.fabric.process.retry import Backoff

log = logging.getLogger(__name__)

MADE_UP_FOR = timedelta(days=1)
"""A run that ended longer ago is not looked at when a coordinator begins to lead."""
PAUSE_S = 1.0
"""Between two reports of a run: what happens meanwhile goes together."""
REPORT_WITHIN_S = 120.0
RETRY_CAP_S = 60.0
CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


class RunTracking:
    """Keeps trackers up to date, and says which are not."""

    def __init__(self, engine: Engine, distribution: Distribution, rules: TrackingRules, folder: Path) -> None:
        self._engine = engine
        self._distribution = distribution
        self._rules = rules
        self._event_files = rules.event_files or folder / "tensorboard"
        self._folder = folder
        self._scratch = folder / "tracking"
        self._reporters: dict[str, _Reporter] = {}
        """By tracker: one that hangs holds up no other."""
        self._changed: dict[str, asyncio.Event] = {}
        self._late: dict[str, str] = {}

    def warnings(self) -> Iterator[str]:
        """The runs whose reports do not get through."""
        yield from (f"{run} is not reported: {reason}" for run, reason in self._late.items())

    async def keep(self) -> None:
        """For ever."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        shutil.rmtree(self._scratch, ignore_errors=True)
        try:
            with self._engine.listening(events):
                async with asyncio.TaskGroup() as group:
                    since = datetime.now(UTC) - MADE_UP_FOR
                    for key, run in self._engine.world.runs.items():
                        if not isinstance(run, runs.Ended) or run.ended_at > since:
                            self._look_at(group, key)
                    while True:
                        self._look_at(group, _run_of(await events.get()))
        finally:
            await asyncio.gather(*(each.stop() for each in self._reporters.values()))

    def _look_at(self, group: asyncio.TaskGroup, key: str) -> None:
        run = self._engine.world.runs.get(key)
        if run is None or run.facts.spec.track is None:
            return
        if key in self._changed:
            self._changed[key].set()
        else:
            self._changed[key] = asyncio.Event()
            group.create_task(self._report(key, run.facts.spec.track), name=f"track-{key}")

    async def _report(self, key: str, track: Tracking) -> None:
        """Until the run has ended, and its end is reported; or until it is removed."""
        changed, backoff = self._changed[key], Backoff(cap_s=RETRY_CAP_S)
        try:
            while (run := self._engine.world.runs.get(key)) is not None:
                changed.clear()
                is_over = isinstance(run, runs.Ended) and not self._engine.world.is_publishing(key)
                if wrong := await self._told(run, track, is_over=is_over):
                    if self._late.get(key) != wrong:
                        log.warning("tracking.waits", extra={"run": key, "reason": wrong})
                    self._late[key] = wrong
                    await backoff.wait()
                    continue
                self._late.pop(key, None)
                backoff.reset()
                if is_over and not changed.is_set():
                    return
                await asyncio.sleep(PAUSE_S)
                await changed.wait()
        finally:
            del self._changed[key]
            self._late.pop(key, None)
            shutil.rmtree(self._scratch / key, ignore_errors=True)

    async def _told(self, run: runs.Run, track: Tracking, *, is_over: bool) -> str:
        """Report the run to its trackers; what went wrong, or nothing."""
        record = record_of(run, track)
        if is_over and isinstance(run, runs.Ended):
            record = self._with_end(run, record)
        wrong = []
        for name, record_for in self._trackers(record, track):
            try:
                answer = await self._reporter(name).report(record_for)
                if answer.wants:
                    async with self._reporter(name).room:  # the model may be large: one at a time
                        files = await self._files(run, record)
                        answer = await self._reporter(name).report(record_for.model_copy(update={"files": files}))
                        shutil.rmtree(self._scratch / record.run, ignore_errors=True)
                wrong += [f"{name}: {answer.error}"] if answer.error else []
            except (FedtideError, OSError) as exc:
                wrong.append(f"{name}: {exc}")
        return "; ".join(wrong)

    def _trackers(self, record: RunRecord, track: Tracking) -> Iterator[tuple[str, RunRecord]]:
        if track.tensorboard:
            yield "event files", record.model_copy(update={"event_files": self._event_files.resolve()})
        if track.mlflow:
            schemes = self._rules.artifact_schemes
            yield track.mlflow, record.model_copy(update={"mlflow": track.mlflow, "artifact_schemes": schemes})

    def _reporter(self, name: str) -> _Reporter:
        return self._reporters.setdefault(name, _Reporter(self._folder))

    def _with_end(self, run: runs.Ended, record: RunRecord) -> RunRecord:
        tags = {**record.tags, "fedtide.reason": run.reason} if run.reason else record.tags
        if (release := self._engine.world.release_of(record.run)) is not None:
            tags = {**tags, "fedtide.version": str(release.manifest.version), "fedtide.digest": release.ref.digest}
        return record.model_copy(update={"tags": tags, "ended": run.ended_at.timestamp(), "outcome": run.outcome})

    async def _files(self, run: runs.Run, record: RunRecord) -> dict[str, Path]:
        """The artefacts, as files: metrics of all rounds; of a release its model, and where it comes from."""
        folder = (self._scratch / record.run).resolve()
        told = [{**each.model_dump(), "metrics": views.finite(each.metrics)} for each in record.rounds]
        contents = {"metrics.json": json.dumps(told, indent=1).encode()}
        if (release := self._engine.world.release_of(run.facts.run)) is not None:
            contents["lineage.json"] = release.manifest.model_dump_json(indent=1).encode()
            contents["model.onnx"] = await self._distribution.onnx(release.manifest)

        def write() -> dict[str, Path]:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in contents.items():
                (folder / name).write_bytes(data)
            return {name: folder / name for name in contents}

        return await asyncio.to_thread(write)


def _run_of(event: Event) -> str:
    """The run that an event is about; empty: none."""
    if isinstance(event.data, ReleasePublished):
        return event.data.manifest.lineage.run
    return getattr(event.data, "run", "")


def check(track: Tracking | None, rules: TrackingRules) -> None:
    """Raises ConfigError if this coordinator cannot, or may not, report there."""
    if track is None:
        return
    if not rules.allowed:
        raise ConfigError("track", "runs are reported nowhere else here", "`run show` and the page have their metrics")
    if track.mlflow and rules.mlflow and track.mlflow.rstrip("/") not in [uri.rstrip("/") for uri in rules.mlflow]:
        raise ConfigError("track.mlflow", f"{track.mlflow} is none of this coordinator's", ", ".join(rules.mlflow))
    if track.mlflow and not rules.mlflow and any(os.environ.get(name) for name in CREDENTIALS):
        raise ConfigError(
            "track.mlflow",
            "this coordinator has credentials for MLflow, and does not say for which server",
            "Name it in the coordinator's tracking.mlflow",
        )
    needed = {"mlflow": bool(track.mlflow), "tensorboardX": track.tensorboard}
    for module, is_wanted in needed.items():
        if is_wanted and find_spec(module) is None:
            raise ConfigError("track", f"the coordinator has no {module}", "pip install 'fedtide[tracking]' there")


def record_of(run: runs.Run, track: Tracking) -> RunRecord:
    """The run so far as trackers get it, without its end. Pure."""
    facts, spec = run.facts, run.facts.spec
    params = {f"run_config.{key}": str(value) for key, value in sorted(spec.run_config.items())}
    params |= {f"selector.{key}": value for key, value in sorted(spec.selector.items())}
    for name in ("rounds", "policy", "selection", "stop"):
        value = spec.model_dump(mode="json", exclude_defaults=True).get(name)
        if value:
            params[name] = value if isinstance(value, str) else json.dumps(value)
    tags = {"fedtide.app": spec.app.name, "fedtide.app_digest": spec.app.bundle.digest, "fedtide.by": facts.by}
    tags |= {"fedtide.model": spec.model} if spec.model else {}
    return RunRecord(
        run=facts.run,
        experiment=track.experiment or spec.app.name,
        began=facts.requested_at.timestamp(),
        params=params,
        tags=tags,
        rounds=[_round(run, r) for _, r in sorted(run.rounds.items()) if isinstance(r, rounds.Closed)],
    )


def _round(run: runs.Run, closed: rounds.Closed) -> TrackedRound:
    opened = min((t.opened_at for t in closed.phases.values() if t.opened_at is not None), default=None)
    tallies = closed.phases.values()
    counts = {
        "round_seconds": closed.seconds,
        "bytes_up": float(sum(t.bytes_up for t in tallies)),
        "bytes_down": float(sum(t.bytes_down for t in tallies)),
        "updates": float(len(closed.phases["train"].received)) if "train" in closed.phases else 0.0,
    }
    at = (opened or run.facts.requested_at).timestamp() + closed.seconds
    return TrackedRound(round=closed.number, at=at, metrics={**counts, **closed.metrics})


@dataclass(frozen=True, slots=True)
class _Answer:
    error: str
    wants: bool = False


class _Reporter:
    """The process that has the libraries of one tracker; started when it is needed, again if it has died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self.room = asyncio.Lock()
        """Held while artefacts are on the disk."""

    async def report(self, record: RunRecord) -> _Answer:
        async with self._turn:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            answer = b""
            try:
                async with asyncio.timeout(REPORT_WITHIN_S):
                    process.stdin.write(record.model_dump_json().encode() + b"\n")
                    await process.stdin.drain()
                    answer = await process.stdout.readline()
            except TimeoutError:
                return _Answer(f"no answer within {REPORT_WITHIN_S:g} s")
            except OSError:
                return _Answer("the reporting process ended")
            finally:
                if not answer:
                    await self.stop()  # what it says later would be taken for the answer to the next record
            if not answer:
                return _Answer("the reporting process ended")
            told = json.loads(answer)
            return _Answer(told["error"], told["wants"])

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "tracking.log").open("wb") as logfile:
                self._process = await asyncio.create_subprocess_exec(
                    *module_command("fedtide.coordinator.tracking"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=logfile,
                    preexec_fn=die_with_parent,
                )
        return self._process

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
