"""Aggregators as Kubernetes Jobs. How an attempt ended is read from its Job, even after a restart."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kubernetes import client

from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.config import CoordinatorConfig, Kubernetes
from fedtide.coordinator.launch import job_manifest
from fedtide.coordinator.launch.job_manifest import CONFIG_DIR, PREFIX, TLS_DIR, WORK_DIR
from fedtide.coordinator.launch.launcher import GONE, CredentialsOf, Exit, Reports, worker_config
from fedtide.coordinator.launch.object_watch import ObjectWatch
from fedtide.fabric.cluster.api_calls import ApiRefused, Exists, call
from fedtide.fabric.errors import CapabilityMissing, OutOfMemory, TransientError
from fedtide.fabric.plans.run_spec import RunSpec
from fedtide.fabric.process.retry import Backoff, until_done

log = logging.getLogger(__name__)

REFUSED = CapabilityMissing.exit_code
TERMINATED = 128 + signal.SIGTERM
"""Exit code of an aggregator that was asked to end: by whoever deleted its pod."""
RETRY_S = 1.0
FIRST_LOOK_S, LOOK_S = 10.0, 20.0
"""When a pod that has not started is looked at, and how often."""
HOPELESS_S = 300.0
"""For what no time mends: an image that is not there. A registry may be away for some minutes."""
_HOPELESS = frozenset(
    [
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ErrImagePull",
        "ImageInspectError",
        "ImagePullBackOff",
        "InvalidImageName",
    ]
)
_CODE = re.compile(r"exit code (\d+)")
"""In the message of a Job that failed by a rule of its pod failure policy."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """Why no pod has started."""

    why: str
    is_hopeless: bool = False


ModelBytes = Callable[[RunSpec], int | None]
IsWanted = Callable[[str, int], bool]


class KubernetesLauncher:
    """One Job per attempt; gives the guarantees of `fedtide.coordinator.launch.local.Launcher`.

    Args:
        api: a configured API client.
        model_bytes: how large the model of a run is, if that is known.
        wanted: whether a run still wants the aggregator of an attempt; other Jobs are orphans.
    """

    def __init__(
        self,
        api: client.ApiClient,
        config: CoordinatorConfig,
        kubernetes: Kubernetes,
        credentials: CredentialsOf,
        reports: Reports,
        model_bytes: ModelBytes,
        wanted: IsWanted,
    ) -> None:
        self._jobs, self._core = client.BatchV1Api(api), client.CoreV1Api(api)
        self._config = config
        self._kubernetes = kubernetes
        self._namespace = kubernetes.namespace
        self._credentials = credentials
        self._reports = reports
        self._model_bytes = model_bytes
        self._wanted = wanted
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._known: dict[str, dict[str, Any]] = {}
        self._reported: set[str] = set()
        self._started: set[str] = set()
        self._pending: dict[str, asyncio.Task[None]] = {}
        self._over_quota: dict[tuple[str, int], float] = {}
        """Since when the Job of an attempt does not fit into the quota."""
        self._owner: list[dict[str, Any]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: ObjectWatch | None = None

    def helpers(self) -> tuple[int, ...]:
        return ()

    def prepare(self) -> None:
        """Watch the Jobs that are there, and remove those that no run wants."""
        loop = asyncio.get_running_loop()
        arguments = {"namespace": self._namespace, "label_selector": self._selector()}
        self._watch = ObjectWatch(
            self._jobs.list_namespaced_job,
            arguments,
            lambda kind, job: loop.call_soon_threadsafe(self._on_job, kind, job),
            lambda names: loop.call_soon_threadsafe(self._on_list, names),
        )
        self._watch.start()

    async def launch(self, command: LaunchAggregator, wanted: Callable[[], bool]) -> None:
        """Create the attempt's Job if it is still wanted, or adopt it, once no earlier attempt runs any more.

        Raises:
            TransientError: the API server cannot do it now.
        """
        async with self._locks[command.run]:
            if not wanted():
                return
            await self._end(command.run, but=command.attempt)
            try:
                await self._create(command)
                self._over_quota.pop((command.run, command.attempt), None)
            except ApiRefused as exc:
                await self._refused(command, exc)

    async def _refused(self, command: LaunchAggregator, exc: ApiRefused) -> None:
        """A quota may become free: that is waited for as long as for a machine. Else the attempt has failed."""
        now, attempt = asyncio.get_running_loop().time(), (command.run, command.attempt)
        since = self._over_quota.setdefault(attempt, now)
        if "exceeded quota" in str(exc) and now - since < self._kubernetes.pending_s:
            if since == now:
                await self._reports.waits(*attempt, str(exc))
            raise TransientError(str(exc)) from exc
        del self._over_quota[attempt]
        is_first = command.attempt == 1
        await self._reports.exited(Exit(*attempt, REFUSED, str(exc), hopeless=is_first and now > since))

    async def _create(self, command: LaunchAggregator) -> None:
        name = job_manifest.name_of(self._kubernetes, command.run, command.attempt)
        if await call(self._jobs.read_namespaced_job, name, self._namespace, absent_is_fine=True) is not None:
            return
        size = self._model_bytes(command.spec)
        config = worker_config(command, self._config, WORK_DIR)
        config["larger_machine"] = job_manifest.has_larger(self._kubernetes, size, command.escalation)
        files = {}
        credentials = self._credentials(command.run, command.life)
        if credentials is not None:
            config["credentials"] = f"{CONFIG_DIR}/aggregator.creds"
            files["aggregator.creds"] = credentials.text
        if self._config.ca_file is not None and self._kubernetes.tenant:
            config["ca_file"] = f"{CONFIG_DIR}/ca.crt"  # the Secret of the servers may be in another namespace
            files["ca.crt"] = self._config.ca_file.read_text(encoding="utf-8")
        elif self._config.ca_file is not None:
            config["ca_file"] = f"{TLS_DIR}/ca.crt"
        files["config.json"] = json.dumps(config)
        owner = await self._owner_of_jobs()
        secret = job_manifest.secret(self._kubernetes, command, self._config.tenant, files, owner)
        try:
            await call(self._core.create_namespaced_secret, self._namespace, secret)
        except Exists:
            # An earlier leader began this attempt, and its Job is gone: its task ids must not be used again.
            gone = "its Job was gone when the coordinator came back"
            await self._reports.exited(Exit(command.run, command.attempt, GONE, gone))
            return
        job = job_manifest.job(self._kubernetes, command, self._config.tenant, size, owner)
        try:
            await call(self._jobs.create_namespaced_job, self._namespace, job)
        except ApiRefused:
            await self._delete_secret(name)
            raise
        except TransientError:
            # Perhaps only the answer was lost. If there is no Job, the next try must not find the Secret.
            if await call(self._jobs.read_namespaced_job, name, self._namespace, absent_is_fine=True) is None:
                await self._delete_secret(name)
                raise
        log.info("aggregator.launched", extra={"run": command.run, "job": name})

    async def _owner_of_jobs(self) -> list[dict[str, Any]]:
        """An object of the release, with which Jobs go when it is uninstalled; none if there is none to be seen."""
        name = self._kubernetes.service_account
        if self._owner is None and name:
            try:
                read = self._core.read_namespaced_service_account
                found = await call(read, name, self._namespace, absent_is_fine=True)
            except ApiRefused as exc:
                log.warning("aggregator.no_owner", extra={"reason": str(exc)})
                found = None
            of = {"apiVersion": "v1", "kind": "ServiceAccount", "name": name}
            self._owner = [{**of, "uid": found.metadata.uid}] if found is not None else []
        return self._owner or []

    async def stop(self, run: str) -> None:
        """Delete the run's Jobs; their pods get SIGTERM and their grace period.

        Raises:
            TransientError: the API server cannot do it now.
        """
        async with self._locks[run]:
            await self._end(run, but=None)

    async def close(self) -> None:
        """Watch no longer; Jobs go on and are adopted by the next coordinator."""
        if self._watch is not None:
            self._watch.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _end(self, run: str, but: int | None) -> None:
        """Delete all Jobs of a run but one, and wait until their pods are gone: two would take each other's replies."""
        selector = f"{self._selector()},{PREFIX}run={run}" + (f",{PREFIX}attempt!={but}" if but is not None else "")
        jobs = await call(self._jobs.list_namespaced_job, self._namespace, label_selector=selector)
        for job in jobs.items:
            self._reported.add(job.metadata.name)
            await self._delete(job.metadata.name)
        backoff = Backoff(cap_s=1.0)  # polls: a second watch, for pods, would cost more
        while jobs.items:
            pods = await call(self._core.list_namespaced_pod, self._namespace, label_selector=selector)
            if not any(pod.status is None or pod.status.phase in ("Pending", "Running") for pod in pods.items):
                return
            await backoff.wait()

    async def _delete(self, name: str) -> None:
        await call(
            self._jobs.delete_namespaced_job,
            name,
            self._namespace,
            propagation_policy="Background",
            absent_is_fine=True,
        )

    async def _delete_secret(self, name: str) -> None:
        await call(self._core.delete_namespaced_secret, name, self._namespace, absent_is_fine=True)

    def _on_list(self, names: set[str]) -> None:
        for name in set(self._known) - names:
            self._on_job("DELETED", self._known[name])
        self._spawn(self._remove_secrets())

    def _on_job(self, kind: str, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        if kind == "DELETED":
            self._known.pop(name, None)
            self._report(Exit(*_whose(job), GONE, "its Job was deleted"), name)
            self._spawn(self._remove_secrets())
            return
        self._known[name] = job
        run, attempt = _whose(job)
        ended = _ending(job)
        if ended is not None:
            self._spawn(self._ended_with(job, ended))
        elif kind == "LISTED" and not self._wanted(run, attempt):
            log.info("aggregator.orphan", extra={"job": name})
            self._reported.add(name)
            self._spawn(self._delete_patiently(name))
        elif job["spec"].get("suspend") and name in self._started:
            # Kueue has preempted the Job, and would later start the same attempt again.
            self._report(Exit(run, attempt, GONE, "preempted: its queue suspended it", preempted=True), name)
            self._spawn(self._delete_patiently(name))
        elif (job.get("status") or {}).get("active"):
            self._started.add(name)
            if job["status"].get("ready"):
                self._forget_deadline(name)
            else:
                self._set_deadline(job)
        elif not job["spec"].get("suspend"):
            self._set_deadline(job)

    def _set_deadline(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        if name not in self._pending:
            self._pending[name] = self._spawn(self._look_while_pending(job))

    async def _look_while_pending(self, job: dict[str, Any]) -> None:
        """Tell why the pod does not start, and give it up when it has waited too long, or for what will not come."""
        name, (run, attempt) = job["metadata"]["name"], _whose(job)
        loop, said, hopeless_since = asyncio.get_running_loop(), "", None
        began = loop.time()
        give_up_at = began + self._kubernetes.pending_s
        pause = FIRST_LOOK_S
        while True:
            await asyncio.sleep(max(0.0, min(pause, give_up_at - loop.time())))
            pause = LOOK_S
            try:
                found = await self._why_pending(name)
                if found is None:
                    self._pending.pop(name, None)
                    return
                hopeless_since = (hopeless_since or loop.time()) if found.is_hopeless else None
            except TransientError as exc:
                log.warning("aggregator.look_again", extra={"job": name, "reason": str(exc)})
                give_up_at, pause = max(give_up_at, loop.time() + RETRY_S), RETRY_S
                continue
            if loop.time() >= give_up_at or (hopeless_since and loop.time() - hopeless_since >= HOPELESS_S):
                break
            if found.why != said:
                said = found.why
                await self._reports.waits(run, attempt, said)
        waited_s = loop.time() - began
        self._reported.add(name)
        self._pending.pop(name, None)  # what follows is not to be cancelled when the Job is seen to be gone
        await self._delete_patiently(name)
        reason = f"no pod started in {waited_s:.0f} s: {found.why}"
        # A run that has worked before is not given up because of one machine, or of an hour without one.
        await self._reports.exited(Exit(run, attempt, REFUSED, reason, hopeless=attempt == 1))

    async def _why_pending(self, name: str) -> _Pending | None:
        """Why no pod has started, in the words of the scheduler or of the Job controller; None: one has."""
        pods = await call(self._core.list_namespaced_pod, self._namespace, label_selector=f"job-name={name}")
        if any(pod.status is not None and pod.status.phase not in (None, "Pending") for pod in pods.items):
            return None
        for pod in pods.items:
            for condition in (pod.status.conditions if pod.status is not None else None) or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    return _Pending(f"{condition.message}. Add such a node, or lower the tier's resources")
            for container in (pod.status.container_statuses if pod.status is not None else None) or []:
                waiting = container.state.waiting if container.state is not None else None
                if waiting is not None:
                    why = f"{waiting.reason}: {waiting.message or 'see kubectl describe pod'}"
                    return _Pending(why, waiting.reason in _HOPELESS)
        events = await call(
            self._core.list_namespaced_event, self._namespace, field_selector=f"involvedObject.name={name}"
        )
        said = [event.message for event in events.items if event.type == "Warning"]
        return _Pending(said[-1] if said else f"see `kubectl -n {self._namespace} describe job {name}`")

    async def _ended_with(self, job: dict[str, Any], ending: _Ending) -> None:
        name, (run, attempt) = job["metadata"]["name"], _whose(job)
        if name in self._reported:
            return
        self._forget_deadline(name)
        code, reason, out_of_memory, is_gone = ending.code, ending.reason, False, False
        try:
            pods = await call(self._core.list_namespaced_pod, self._namespace, label_selector=f"job-name={name}")
            is_gone = not pods.items
            for pod in pods.items:
                for container in (pod.status.container_statuses if pod.status is not None else None) or []:
                    done = container.state.terminated if container.state is not None else None
                    if done is not None:
                        code, out_of_memory = done.exit_code, done.reason == "OOMKilled"
                        reason = ((done.message or "").strip().splitlines() or [reason])[-1]
        except TransientError as exc:
            log.info("aggregator.pod_not_read", extra={"job": name, "reason": str(exc)})
        out_of_memory = out_of_memory or code == OutOfMemory.exit_code
        if out_of_memory:
            reason = f"out of memory: {reason}"
        # Of a pod that failed by itself something is left; one that somebody deletes says how it ended, or nothing.
        preempted = ending.preempted or code == TERMINATED or (is_gone and code is None)
        self._report(
            Exit(
                run,
                attempt,
                1 if code is None else code,
                (f"preempted: {reason}" if preempted else reason)[:500],
                preempted=preempted,
                out_of_memory=out_of_memory,
            ),
            name,
        )

    def _report(self, how: Exit, name: str) -> None:
        self._forget_deadline(name)
        if name not in self._reported:
            self._reported.add(name)
            self._spawn(self._reports.exited(how))

    def _forget_deadline(self, name: str) -> None:
        if task := self._pending.pop(name, None):
            task.cancel()

    async def _delete_patiently(self, name: str) -> None:
        await until_done(log, "aggregator.delete_waits", lambda: self._delete(name), job=name)

    async def _remove_secrets(self) -> None:
        """Delete the Secrets of attempts that are no longer wanted."""
        try:
            found = await call(self._core.list_namespaced_secret, self._namespace, label_selector=self._selector())
            for secret in found.items:
                labels = secret.metadata.labels
                if not self._wanted(labels[f"{PREFIX}run"], int(labels[f"{PREFIX}attempt"])):
                    await self._delete_secret(secret.metadata.name)
        except TransientError as exc:
            log.info("aggregator.secrets_left", extra={"reason": str(exc)})

    def _selector(self) -> str:
        return job_manifest.selector(self._kubernetes, self._config.tenant)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _whose(job: dict[str, Any]) -> tuple[str, int]:
    labels = job["metadata"]["labels"]
    return labels[f"{PREFIX}run"], int(labels[f"{PREFIX}attempt"])


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a Job ended. `code`: None if its message does not tell it."""

    code: int | None
    reason: str = ""
    preempted: bool = False


def _ending(job: dict[str, Any]) -> _Ending | None:
    """None while the Job runs."""
    for condition in (job.get("status") or {}).get("conditions") or []:
        if condition.get("status") != "True":
            continue
        if condition["type"] == "Complete":
            return _Ending(0)
        if condition["type"] == "Failed":
            said = condition.get("message", "") or condition.get("reason", "")
            found = _CODE.search(said)
            return _Ending(int(found[1]) if found is not None else None, said, "DisruptionTarget" in said)
    return None
