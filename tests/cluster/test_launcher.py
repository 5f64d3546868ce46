"""The Kubernetes launcher against an API server over HTTP: Jobs, how they end, and what may go wrong between."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import kubernetes_validate
import pytest
from kubernetes import client

from fedtide.coordinator.commands import LaunchAggregator
from fedtide.coordinator.config import CoordinatorConfig, Kubernetes, Tier
from fedtide.coordinator.launch import kubernetes
from fedtide.coordinator.launch.job_manifest import has_larger, job, name_of
from fedtide.coordinator.launch.kubernetes import KubernetesLauncher
from fedtide.coordinator.launch.launcher import GONE, Exit
from fedtide.fabric.errors import OutOfMemory, TransientError
from fedtide.fabric.plans.run_spec import AppRef, RunSpec
from fedtide.fabric.tensors.blobs import BlobRef
from tests.cluster.api_server import DROP, ApiServer, Refusal

SPEC = RunSpec(app=AppRef(name="app", bundle=BlobRef(digest="0" * 64, size_bytes=0)), model="digits")
CLUSTER = Kubernetes(
    namespace="fl",
    image="registry.example/aggregator:1",
    release="ft",
    tiers=[
        Tier(up_to_bytes=1000, resources={"cpu": "1", "memory": "2Gi"}),
        Tier(up_to_bytes=10**6, resources={"cpu": "2", "nvidia.com/mig-1g.10gb": "1"}),
        Tier(resources={"cpu": "8", "nvidia.com/gpu": "2"}, node_selector={"pool": "gpu"}),
    ],
    pending_s=30,
)
CONFIG = CoordinatorConfig(nats_url="tls://hub:4222", regions=["eu"])


class Cluster:
    def __init__(self, server: ApiServer, **changes: Any) -> None:
        self.server = server
        self.config = CLUSTER.model_copy(update=changes)
        self.wanted: set[tuple[str, int]] = {("run-1", 1)}
        self.exits: asyncio.Queue[Exit] = asyncio.Queue()

        self.waiting: asyncio.Queue[str] = asyncio.Queue()

    async def exited(self, how: Exit) -> None:
        self.exits.put_nowait(how)

    async def waits(self, run: str, attempt: int, reason: str) -> None:
        self.waiting.put_nowait(reason)

    def launcher(self) -> KubernetesLauncher:
        settings = client.Configuration(host=self.server.url)
        settings.retries = False
        return KubernetesLauncher(
            client.ApiClient(settings),
            CONFIG.model_copy(update={"tenant": self.config.tenant or CONFIG.tenant}),
            self.config,
            lambda *_: None,
            self,
            model_bytes=lambda _: 5000,
            wanted=lambda run, attempt: (run, attempt) in self.wanted,
        )

    async def exit(self) -> Exit:
        async with asyncio.timeout(10):
            return await self.exits.get()


@asynccontextmanager
async def launching(cluster: Cluster) -> AsyncIterator[KubernetesLauncher]:
    launcher = cluster.launcher()
    launcher.prepare()
    try:
        yield launcher
    finally:
        await launcher.close()
        cluster.server.cut()


def launch(attempt: int = 1, run: str = "run-1") -> LaunchAggregator:
    return LaunchAggregator(run, attempt, SPEC)


def _always() -> bool:
    return True


def _creates_a_job(method: str, path: str) -> bool:
    return method == "POST" and path.endswith("/jobs")


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  # what serves HTTP in a thread sets no event of ours
            await asyncio.sleep(0.02)


def test_what_a_job_asks_for_depends_on_the_size_of_its_model() -> None:
    def resources(size: int | None) -> dict[str, str]:
        pod = job(CLUSTER, launch(), "default", size)["spec"]["template"]["spec"]
        return dict(pod["containers"][0]["resources"]["limits"])

    assert resources(None) == resources(1000) == {"cpu": "1", "memory": "2Gi"}
    assert resources(1001)["nvidia.com/mig-1g.10gb"] == "1"
    assert resources(10**9)["nvidia.com/gpu"] == "2"


async def test_tenants_of_one_namespace_do_not_see_each_others_jobs() -> None:
    with ApiServer() as server:
        acme, globex = Cluster(server, tenant="acme"), Cluster(server, tenant="globex")
        async with launching(acme) as first, launching(globex) as second:
            await first.launch(launch(), _always)
            await second.launch(launch(), _always)
            assert sorted(server.names("jobs")) == ["ft-acme-run-1-1", "ft-globex-run-1-1"]
            await second.stop("run-1")
            await _until(lambda: server.names("jobs") == ["ft-acme-run-1-1"])
            assert acme.exits.empty()
        globex.wanted.clear()
        async with launching(globex):  # nothing of another is an orphan
            await asyncio.sleep(0.3)
            assert server.names("jobs") == ["ft-acme-run-1-1"]


def test_a_job_of_a_queue_waits_to_be_admitted_and_names_run_model_and_tenant() -> None:
    made = job(CLUSTER.model_copy(update={"queue": "team-a"}), launch(), "acme", None)
    assert made["spec"]["suspend"] is True
    labels = made["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "team-a"
    assert (labels["fedtide.dev/run"], labels["fedtide.dev/model"], labels["fedtide.dev/tenant"]) == (
        "run-1",
        "digits",
        "acme",
    )


async def test_an_attempt_is_started_once_and_its_end_is_told() -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
            await launcher.launch(launch(), _always)
            assert server.names("jobs") == ["ft-run-1-1"]
            assert server.names("secrets") == ["ft-run-1-1"]
            done = {"conditions": [{"type": "Failed", "status": "True", "message": "BackoffLimitExceeded"}]}
            server.put("pods", _pod("ft-run-1-1", exit_code=75))
            server.set_status("jobs", "ft-run-1-1", done)
            assert await cluster.exit() == Exit("run-1", 1, 75, "broken off")


async def test_a_preempted_pod_is_told_from_one_that_failed() -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
            said = "Pod fl/x has condition DisruptionTarget matching FailJob rule at index 0"
            status = {
                "conditions": [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": said}]
            }
            server.set_status("jobs", "ft-run-1-1", status)
            ended = await cluster.exit()
            assert (ended.run, ended.attempt, ended.preempted) == ("run-1", 1, True)
            assert ended.reason.startswith("preempted")


@pytest.mark.parametrize(
    ("said", "code", "is_from_outside"),
    [
        ("Container aggregator for pod fl/x failed with exit code 71 matching FailJob rule at index 1", 71, False),
        ("Container aggregator for pod fl/x failed with exit code 143 matching FailJob rule at index 1", 143, True),
        ("Container aggregator for pod fl/x failed with exit code 137 matching FailJob rule at index 1", 137, False),
        ("Job has reached the specified backoff limit", 1, True),
    ],
)
async def test_a_pod_that_somebody_deletes_is_no_crash_and_exit_codes_outlive_pods(
    said: str, code: int, is_from_outside: bool
) -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
            status = {"conditions": [{"type": "Failed", "status": "True", "message": said}]}
            server.set_status("jobs", "ft-run-1-1", status)
            ended = await cluster.exit()
            assert (ended.code, ended.preempted) == (code, is_from_outside)
            assert ended.out_of_memory == (code == OutOfMemory.exit_code)


async def test_a_pod_that_ran_out_of_memory_says_so_and_the_next_tier_is_larger() -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
            server.put("pods", _pod("ft-run-1-1", exit_code=137, reason="OOMKilled"))
            server.set_status("jobs", "ft-run-1-1", {"conditions": [{"type": "Failed", "status": "True"}]})
            ended = await cluster.exit()
            assert (ended.out_of_memory, ended.preempted) == (True, False)
            assert ended.reason.startswith("out of memory")
        secret = server.one("secrets", "ft-run-1-1")["data"]["config.json"]
        assert json.loads(base64.b64decode(secret))["larger_machine"] is True
    assert not has_larger(CLUSTER, 5000, 1)
    for escalation, wanted in ((0, "nvidia.com/mig-1g.10gb"), (1, "nvidia.com/gpu"), (9, "nvidia.com/gpu")):
        asked = LaunchAggregator("run-1", 2, SPEC, escalation=escalation)
        assert wanted in _pod_of(CLUSTER, asked)["containers"][0]["resources"]["limits"]


async def test_jobs_and_their_secrets_go_with_the_release() -> None:
    with ApiServer() as server:
        cluster = Cluster(server, service_account="ft-aggregator")
        account = {"metadata": {"name": "ft-aggregator", "namespace": "fl"}}
        uid = server.put("serviceaccounts", account)["metadata"]["uid"]
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
        for plural in ("jobs", "secrets"):
            (owner,) = server.one(plural, "ft-run-1-1")["metadata"]["ownerReferences"]
            assert owner == {"apiVersion": "v1", "kind": "ServiceAccount", "name": "ft-aggregator", "uid": uid}


def test_a_job_asks_for_devices_and_for_a_place_as_its_owner_says() -> None:
    config = CLUSTER.model_copy(
        update={
            "tiers": [Tier(resources={"cpu": "1"}, claims={"gpu": "half-a-gpu"})],
            "scheduler": "volcano",
            "near_hub": True,
            "undisturbed": True,
            "annotations": {"scheduling.volcano.sh/queue-name": "research"},
        }
    )
    template = job(config, launch(), "default", None)["spec"]["template"]
    pod = template["spec"]
    assert pod["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]
    assert pod["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "half-a-gpu"}]
    assert pod["schedulerName"] == "volcano"
    (near,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"]["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "nats"
    assert template["metadata"]["annotations"] == {
        "scheduling.volcano.sh/queue-name": "research",
        "karpenter.sh/do-not-disrupt": "true",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    }
    kubernetes_validate.validate({**job(config, launch(), "default", None)}, "1.35", strict=True)


async def test_a_job_that_ended_while_nobody_looked_is_told_by_the_next_coordinator() -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
        server.set_status("jobs", "ft-run-1-1", {"conditions": [{"type": "Complete", "status": "True"}]})
        async with launching(cluster):
            assert await cluster.exit() == Exit("run-1", 1, 0)
        (key,) = [k for k in server.objects if k[0] == "jobs"]
        del server.objects[key]  # its time to live is over
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
            assert (await cluster.exit()).code == GONE
            assert server.names("jobs") == []


async def test_jobs_that_no_run_wants_are_removed_and_an_older_attempt_ends_first() -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        server.put("jobs", job(CLUSTER, launch(run="run-0"), "default", None))
        async with launching(cluster) as launcher:
            await _until(lambda: server.names("jobs") == [])
            await launcher.launch(launch(), _always)
            cluster.wanted = {("run-1", 2)}
            await launcher.launch(launch(2), _always)
            assert server.names("jobs") == ["ft-run-1-2"]
            await launcher.stop("run-1")
            assert server.names("jobs") == []


@pytest.mark.parametrize("how", ["cut", "gone", "500", "429", "drop"])
async def test_a_watch_goes_on_after_whatever_interrupts_it(how: str) -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            await launcher.launch(launch(), _always)
            await _until(lambda: any("watch" in query for _, _, query, _ in server.requests))
            listing = lambda method, path: method == "GET" and path.endswith("/jobs")  # noqa: E731
            match how:
                case "gone":
                    server.compact()
                case "500":
                    server.fault(listing, Refusal(500, "InternalError"))
                case "429":
                    server.fault(listing, Refusal(429, "TooManyRequests", headers={"Retry-After": "0.1"}))
                case "drop":
                    server.fault(listing, DROP)
            server.cut()
            server.set_status("jobs", "ft-run-1-1", {"conditions": [{"type": "Complete", "status": "True"}]})
            assert await cluster.exit() == Exit("run-1", 1, 0)


@pytest.mark.parametrize("how", [Refusal(500, "InternalError"), Refusal(429, "TooManyRequests"), DROP])
async def test_a_server_that_cannot_now_is_asked_again(how: Any) -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            server.fault(_creates_a_job, how)
            with pytest.raises(TransientError, match="Kubernetes API"):
                await launcher.launch(launch(), _always)
            await launcher.launch(launch(), _always)
            assert server.names("jobs") == ["ft-run-1-1"]
            assert cluster.exits.empty()


async def test_a_quota_that_is_exceeded_is_said_with_what_to_do() -> None:
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            said = 'jobs.batch "ft-run-1-1" is forbidden: exceeded quota: tenant, requested: nvidia.com/gpu=2'
            server.fault(
                lambda method, path: method == "POST" and path.endswith("/jobs"), Refusal(403, "Forbidden", said)
            )
            with pytest.raises(TransientError, match="exceeded quota"):
                await launcher.launch(launch(), _always)
            assert "Raise the namespace's ResourceQuota" in cluster.waiting.get_nowait()
            await launcher.launch(launch(), _always)
            assert server.names("jobs") == ["ft-run-1-1"], "the quota has become free"


async def test_a_pod_that_finds_no_node_is_given_up_with_the_schedulers_words() -> None:
    with ApiServer() as server:
        cluster = Cluster(server, pending_s=0.3)
        async with launching(cluster) as launcher:
            pod = _pod(name_of(CLUSTER, "run-1", 1))
            said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu"
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
            server.put("pods", {**pod, "status": {"phase": "Pending", "conditions": [condition]}})
            await launcher.launch(launch(), _always)
            ended = await cluster.exit()
            assert f"{said}. Add such a node" in ended.reason and ended.hopeless
            assert server.names("jobs") == []


async def test_a_quota_that_stays_exceeded_is_not_waited_for_for_ever() -> None:
    with ApiServer() as server:
        cluster = Cluster(server, pending_s=2)
        async with launching(cluster) as launcher:
            said = 'jobs.batch "ft-run-1-1" is forbidden: exceeded quota: tenant'
            for _ in range(3):
                server.fault(_creates_a_job, Refusal(403, "Forbidden", said))
            for _ in range(2):
                with pytest.raises(TransientError):
                    await launcher.launch(launch(), _always)
            await asyncio.sleep(2.1)
            await launcher.launch(launch(), _always)
            ended = await cluster.exit()
            assert ended.hopeless and "exceeded quota" in ended.reason


async def test_a_pod_that_has_started_is_not_given_up_and_a_run_that_has_worked_is_tried_again() -> None:
    with ApiServer() as server:
        cluster = Cluster(server, pending_s=0.2)
        cluster.wanted = {("run-1", 1), ("run-1", 2)}
        async with launching(cluster) as launcher:
            server.put("pods", {**_pod(name_of(CLUSTER, "run-1", 1)), "status": {"phase": "Running"}})
            await launcher.launch(launch(), _always)
            await launcher.launch(launch(run="run-2"), _always)
            assert (await cluster.exit()).run == "run-2", "its pod has not"
            assert cluster.exits.empty() and "ft-run-1-1" in server.names("jobs")
            await launcher.stop("run-1")
            server.remove("pods", f"{name_of(CLUSTER, 'run-1', 1)}-x")
            await launcher.launch(launch(2), _always)
            ended = await cluster.exit()
            assert (ended.attempt, ended.hopeless) == (2, False)


async def test_why_a_pod_does_not_start_is_told_meanwhile_and_a_missing_image_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seconds in (("FIRST_LOOK_S", 0.05), ("LOOK_S", 0.05), ("HOPELESS_S", 0.3)):
        monkeypatch.setattr(kubernetes, name, seconds)
    with ApiServer() as server:
        cluster = Cluster(server)
        async with launching(cluster) as launcher:
            pod = _pod(name_of(CLUSTER, "run-1", 1))
            pod["status"]["phase"] = "Pending"
            pod["status"]["containerStatuses"][0]["state"] = {
                "waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image aggregator:1"}
            }
            server.put("pods", pod)
            await launcher.launch(launch(), _always)
            async with asyncio.timeout(10):
                told = await cluster.waiting.get()
            assert told.startswith("ImagePullBackOff: Back-off pulling")
            ended = await cluster.exit()
            assert ended.hopeless and told in ended.reason
            assert cluster.waiting.empty(), "the same reason is told once"
            assert server.names("jobs") == []


def _pod_of(config: Kubernetes, asked: LaunchAggregator) -> dict[str, Any]:
    return dict(job(config, asked, "default", 5000)["spec"]["template"]["spec"])


def _pod(job_name: str, exit_code: int = 0, reason: str = "Error") -> dict[str, Any]:
    ended = {"terminated": {"exitCode": exit_code, "message": "a line\nbroken off\n", "reason": reason}}
    status = {
        "name": "aggregator",
        "image": "i",
        "imageID": "i",
        "ready": False,
        "restartCount": 0,
        "state": ended,
    }
    return {
        "metadata": {"name": f"{job_name}-x", "namespace": "fl", "labels": {"job-name": job_name}},
        "status": {"phase": "Failed", "containerStatuses": [status]},
    }
