"""Runs in MLflow and TensorBoard: each that asks for it is reported as it goes, and with its results when it has ended.

What is reported is the run as a whole, whenever it has changed: a report that failed, or a coordinator that came back,
makes up for what is missing. A tracker that is away holds up nothing but its own reports.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

from fedtide.coordinator.adapters.distribution import Distribution
from fedtide.coordinator.config import TrackingRules
from fedtide.coordinator.log.engine import Engine
from fedtide.coordinator.models.registry import Release
from fedtide.coordinator.runs import rounds, runs
from fedtide.coordinator.tracking.record import RunRecord, TrackedRound
from fedtide.fabric.errors import ConfigError, FedtideError
from fedtide.fabric.events.envelope import Event
from fedtide.fabric.plans.tracking import Tracking
from fedtide.fabric.process.retry import Backoff

log = logging.getLogger(__name__)

MADE_UP_FOR = timedelta(days=1)
"""A run that ended longer ago is not looked at when a coordinator begins to lead."""
PAUSE_S = 1.0
"""Between two reports of a run: what happens meanwhile goes together."""
LONGEST_RECORD = 64 * 1024 * 1024


class RunTracking:
    """Keeps trackers up to date, and says which are not."""

    def __init__(self, engine: Engine, distribution: Distribution, rules: TrackingRules, folder: Path) -> None:
        self._engine = engine
        self._distribution = distribution
        self._event_files = rules.event_files or folder / "tensorboard"
        self._scratch = folder / "tracking"
        self._reporter = _Reporter(folder)
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
                        self._look_at(group, getattr((await events.get()).data, "run", None))
        finally:
            await self._reporter.stop()

    def _look_at(self, group: asyncio.TaskGroup, key: str | None) -> None:
        run = self._engine.world.runs.get(key or "")
        if run is None or run.facts.spec.track is None:
            return
        run_key = run.facts.run
        if run_key in self._changed:
            self._changed[run_key].set()
        else:
            self._changed[run_key] = asyncio.Event()
            group.create_task(self._report(run_key, run.facts.spec.track), name=f"track-{run_key}")

    async def _report(self, key: str, track: Tracking) -> None:
        """Until the run has ended, and its end is reported; or until it is removed."""
        changed, backoff = self._changed[key], Backoff()
        try:
            while (run := self._engine.world.runs.get(key)) is not None:
                changed.clear()
                is_over = isinstance(run, runs.Ended) and not self._engine.world.is_publishing(key)
                try:
                    wrong = await self._reporter.report(await self._record(run, track, is_over=is_over))
                except (FedtideError, OSError) as exc:
                    wrong = str(exc)
                if wrong:
                    if self._late.get(key) != wrong:
                        log.warning("tracking.waits", extra={"run": key, "reason": wrong})
                    self._late[key] = wrong
                    await backoff.wait()
                    continue
                self._late.pop(key, None)
                backoff = Backoff()
                if is_over:
                    return
                await asyncio.sleep(PAUSE_S)
                await changed.wait()
        finally:
            del self._changed[key]
            self._late.pop(key, None)
            shutil.rmtree(self._scratch / key, ignore_errors=True)

    async def _record(self, run: runs.Run, track: Tracking, *, is_over: bool) -> RunRecord:
        record = record_of(run, track, self._event_files if track.tensorboard else None)
        release = self._engine.world.release_of(run.facts.run)
        if not is_over or not isinstance(run, runs.Ended):
            return record
        files = await self._files(run, record, release)
        tags = {**record.tags, "fedtide.reason": run.reason} if run.reason else record.tags
        if release is not None:
            tags = {**tags, "fedtide.version": str(release.manifest.version), "fedtide.digest": release.ref.digest}
        end = {"ended": run.ended_at.timestamp(), "outcome": run.outcome}
        return record.model_copy(update={"files": files, "tags": tags, **end})

    async def _files(self, run: runs.Run, record: RunRecord, release: Release | None) -> dict[str, Path]:
        """The artefacts, as files: metrics of all rounds; of a release its model, and where it comes from."""
        folder = self._scratch / run.facts.run
        contents = {"metrics.json": json.dumps([each.model_dump() for each in record.rounds], indent=1).encode()}
        if release is not None:
            contents["lineage.json"] = release.manifest.model_dump_json(indent=1).encode()
            contents["model.onnx"] = await self._distribution.onnx(release.manifest)

        def write() -> dict[str, Path]:
            folder.mkdir(parents=True, exist_ok=True)
            for name, data in contents.items():
                (folder / name).write_bytes(data)
            return {name: (folder / name).resolve() for name in contents}

        return await asyncio.to_thread(write)


def check(track: Tracking | None, rules: TrackingRules) -> None:
    """Raises ConfigError if this coordinator cannot, or may not, report there."""
    if track is None:
        return
    if track.mlflow and rules.mlflow and track.mlflow.rstrip("/") not in [uri.rstrip("/") for uri in rules.mlflow]:
        raise ConfigError("track.mlflow", f"{track.mlflow} is none of this coordinator's", ", ".join(rules.mlflow))
    needed = {"mlflow": bool(track.mlflow), "tensorboardX": track.tensorboard}
    for module, is_wanted in needed.items():
        if is_wanted and find_spec(module) is None:
            raise ConfigError("track", f"the coordinator has no {module}", "pip install 'fedtide[tracking]' there")


def record_of(run: runs.Run, track: Tracking, event_files: Path | None) -> RunRecord:
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
        mlflow=track.mlflow,
        event_files=event_files,
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


class _Reporter:
    """The process that has the trackers' libraries; started when it is needed, again if it has died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def report(self, record: RunRecord) -> str:
        """What went wrong, or nothing."""
        async with self._turn:
            process = await self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(record.model_dump_json().encode() + b"\n")
                await process.stdin.drain()
                answer = await process.stdout.readline()
            except asyncio.CancelledError:
                await self.stop()  # its answer would be taken for that to the next record
                raise
            except OSError:
                answer = b""
            if not answer:
                await self.stop()
                return "the reporting process ended"
            told: str = json.loads(answer)["error"]
            return told

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "tracking.log").open("wb") as logfile:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "fedtide.coordinator.tracking"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=logfile,
                    limit=LONGEST_RECORD,
                )
        return self._process

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
