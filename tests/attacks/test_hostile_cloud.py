"""Everybody in the cloud and on the way, each alone with all keys that are theirs: a node does what the root lets.

- coordinator and director (their own keys): a release that nobody vouches for, or that was vouched for as another one;
  an app that no publisher has signed; delegations or a root of their own.
- an aggregator (the mandate of its run): another app, another run, what is served; anything after its end.
- the release authority: orders, apps, models that are not its own. A publisher: apps of others, orders, releases.
- a mirror (a region's server; every byte on the way): other bytes, somebody else's order, what was true before, nothing
  new for weeks, another time.
- whoever has heard a question: the same again, later.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from fedtide.edge_agent.identity.node_trust import NodeTrust
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.events.identity import OrderRefused
from fedtide.fabric.messages.orders import OrderList, OrdersQuestion
from fedtide.fabric.messages.tasks import Cancel, Task
from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.node_answers import STATUS
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.release import Lineage, ReleaseManifest, decode_release
from fedtide.fabric.plans.rollout_plan import Desired
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.tensors.blobs import BlobRef
from fedtide.fabric.trust.claims import signed_app
from fedtide.fabric.trust.libraries import CryptoSigner
from fedtide.fabric.trust.provenance import external, sealed, statement
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import AT, SIGNATURE, header_of, sign, signed_bytes
from fedtide.fabric.trust.store import TrustStore, pin_of
from tests.served import config
from tests.training import jobs
from tests.trust import NOW, Keys, Published, aggregator

SUBJECTS = Subjects()
APP = "a" * 64
DESIRED = SUBJECTS.desired("eu", "n1", "digits")
TASK = SUBJECTS.task("eu", "n1", "run-1", "run-1-t1")


@dataclass
class Line:
    """The way to the coordinator: what it answers, and what somebody on the way makes of it."""

    published: Published
    asked: int = 0
    alters: Callable[[Received], Received] = lambda answer: answer
    told_of: TrustMetadata | None = None
    now: float = NOW.timestamp() + 60

    async def ask_with_headers(self, subject: str, data: bytes, _: object, *, timeout_s: float) -> Received:
        self.asked += 1
        question = from_json(OrdersQuestion, data, "question")
        known = question.known
        assert known is not None
        told = self.told_of or self.published.metadata
        answer = to_json(OrderList(now=self.now, trust=told.model_copy(update={"roots": told.roots[known.root :]})))
        signature = sign([self.published.keys.director], signed_bytes(subject, answer, question.nonce))
        return self.alters(Received(subject, answer, {SIGNATURE: header_of(signature), AT: question.nonce}))


@dataclass
class Attacked:
    """A node that has joined an installation."""

    line: Line
    trust: NodeTrust
    store: TrustStore
    told: list[OrderRefused] = field(default_factory=list)

    @property
    def keys(self) -> Keys:
        return self.line.published.keys

    def refused(self) -> list[tuple[str, str]]:
        return [(each.what, each.refusal) for each in self.told]


async def node_of(folder: Path, **scopes: list[str]) -> Attacked:
    published = Published.first(**scopes)
    store = TrustStore(folder / "trust")
    store.set_pin(pin_of(published.metadata.roots[0]))
    told: list[OrderRefused] = []

    async def tell(data: OrderRefused) -> None:
        told.append(data)

    line = Line(published)
    trust = NodeTrust(config(folder), store, line, tell)
    _, is_believed = await trust.orders()
    assert is_believed
    return Attacked(line, trust, store, told)


def task(run: str = "run-1", app: str = APP) -> Task:
    made = jobs.task(jobs.message("train", {}, {}), {})
    named = AppRef(name="digits", bundle=BlobRef(digest=app, size_bytes=1))
    return made.model_copy(update={"task": "run-1-t1", "run": run, "app": named})


def signed(subject: str, body: Any, *signers: CryptoSigner, at: str = "") -> Received:
    data = body if isinstance(body, bytes) else to_json(body)
    headers = {SIGNATURE: header_of(sign(signers, signed_bytes(subject, data, at)))}
    return Received(subject, data, {**headers, **({AT: at} if at else {})})


def of_run(subject: str, body: Any, **changes: Any) -> Callable[[Attacked], Received]:
    def made(node: Attacked) -> Received:
        data = to_json(body)
        return Received(subject, data, aggregator(node.keys, **changes).headers(subject, data))

    return made


def desired(counter: int = 1) -> Desired:
    return Desired(model="digits", counter=counter, rollout="r", release=None)


async def test_what_those_say_who_may_say_it_is_followed(tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    await node.trust.desired(signed(DESIRED, desired(), node.keys.director))
    order = task()
    await node.trust.order(of_run(TASK, order)(node), order)
    cancel = Cancel(task="run-1-t1", run="run-1")
    await node.trust.order(of_run(TASK, cancel)(node), cancel)
    await node.trust.order(signed(TASK, cancel, node.keys.director), cancel)
    assert await node.trust.app(signed_app(order.app, [node.keys.publisher])) == {"publisher-al"}
    raw = to_json(manifest())
    assert await node.trust.release(raw, sealed(statement(raw, about(raw)), [node.keys.releases]), "digits") == {
        "releases"
    }
    assert node.told == []


STRANGER = Keys()
ORDERS: dict[str, tuple[Callable[[Attacked], Received], str]] = {
    "unsigned": (lambda n: Received(DESIRED, to_json(desired()), {}), "arbitrary"),
    "signed by a stranger": (lambda n: signed(DESIRED, desired(), STRANGER.director), "unknown_signer"),
    "signed by the release authority": (lambda n: signed(DESIRED, desired(), n.keys.releases), "wrong_target"),
    "signed by a publisher": (lambda n: signed(DESIRED, desired(), n.keys.publisher), "wrong_target"),
    "signed by the timestamp's key": (lambda n: signed(DESIRED, desired(), n.keys.timestamp), "unknown_signer"),
    "an aggregator's": (of_run(DESIRED, desired()), "wrong_target"),
    "of another node": (
        lambda n: replace(signed(SUBJECTS.desired("eu", "n2", "digits"), desired(), n.keys.director), subject=DESIRED),
        "arbitrary",
    ),
    "with other bytes": (
        lambda n: replace(signed(DESIRED, desired(), n.keys.director), data=to_json(desired(99))),
        "arbitrary",
    ),
    "with a header that is none": (lambda n: Received(DESIRED, b"{}", {SIGNATURE: "="}), "arbitrary"),
}


@pytest.mark.parametrize("name", ORDERS)
async def test_what_a_node_serves_is_ordered_by_the_director_only(name: str, tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    made, kind = ORDERS[name]
    with pytest.raises(Untrusted) as refused:
        await node.trust.desired(made(node))
    assert refused.value.kind == kind
    assert node.refused() == [("desired", kind)]


TASKS: dict[str, tuple[Callable[[Attacked], Received], Task | Cancel, str]] = {
    "the director's own, without a mandate": (lambda n: signed(TASK, task(), n.keys.director), task(), "arbitrary"),
    "of another run": (of_run(TASK, task("run-2")), task("run-2"), "wrong_target"),
    "of another app": (of_run(TASK, task(app="b" * 64)), task(app="b" * 64), "wrong_target"),
    "after its end": (of_run(TASK, task(), ends_at=NOW.timestamp()), task(), "expired"),
    "with another's mandate": (
        lambda n: replace(
            of_run(TASK, task())(n), headers={**of_run(TASK, task())(n).headers, SIGNATURE: f"{'0' * 64}=00"}
        ),
        task(),
        "arbitrary",
    ),
    "with a mandate of its own": (
        lambda n: Received(TASK, to_json(task()), aggregator(STRANGER).headers(TASK, to_json(task()))),
        task(),
        "unknown_signer",
    ),
    "with a mandate that is none": (lambda n: Received(TASK, b"{}", {"Fedtide-Mandate": "{}"}), task(), "arbitrary"),
    "the end of another run's": (
        of_run(TASK, Cancel(task="run-1-t1", run="run-2")),
        Cancel(task="run-1-t1", run="run-2"),
        "wrong_target",
    ),
    "an end that nobody has signed": (
        lambda n: Received(TASK, to_json(Cancel(task="run-1-t1", run="run-1")), {}),
        Cancel(task="run-1-t1", run="run-1"),
        "arbitrary",
    ),
}


@pytest.mark.parametrize("name", TASKS)
async def test_an_aggregator_speaks_for_its_run_and_its_app_only(name: str, tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    made, order, kind = TASKS[name]
    with pytest.raises(Untrusted) as refused:
        await node.trust.order(made(node), order)
    assert refused.value.kind == kind


def about(raw: bytes) -> dict[str, Any]:
    return {"buildDefinition": {"externalParameters": external(decode_release(raw))}}


def manifest(model: str = "digits", version: int = 1) -> ReleaseManifest:
    ref = BlobRef(digest="c" * 64, size_bytes=1)
    lineage = Lineage(app=AppRef(name="digits", bundle=ref), run="run-1", rounds=1, participants=1, updates=1)
    return ReleaseManifest(model=model, version=version, onnx=ref, arrays=ref, smoke=ref, lineage=lineage)


@pytest.mark.parametrize(
    ("by", "model", "named", "kind"),
    [
        ("director", "digits", "digits", "wrong_target"),
        ("publisher", "digits", "digits", "wrong_target"),
        ("timestamp", "digits", "digits", "unknown_signer"),
        ("root", "digits", "digits", "unknown_signer"),
        ("releases", "other", "other", "wrong_target"),
        ("releases", "digits", "digits-2", "wrong_target"),
    ],
)
async def test_a_release_is_vouched_for_by_those_who_may_for_its_model(
    by: str, model: str, named: str, kind: str, tmp_path: Path
) -> None:
    node = await node_of(tmp_path, models=["digits"])
    raw, other = to_json(manifest(model)), to_json(manifest(named, 2))
    envelope = sealed(statement(said := raw if model == named else other, about(said)), [getattr(node.keys, by)])
    with pytest.raises(Untrusted) as refused:
        await node.trust.release(raw, envelope, model)
    assert refused.value.kind == kind
    for nothing in ("", "{}", "nonsense"):
        with pytest.raises(Untrusted):
            await node.trust.release(raw, nothing, model)


@pytest.mark.parametrize("by", ["director", "releases", "timestamp", None])
async def test_an_app_is_signed_by_its_publisher(by: str | None, tmp_path: Path) -> None:
    node = await node_of(tmp_path, apps=["dig*"])
    app = task().app
    with pytest.raises(Untrusted):
        await node.trust.app(signed_app(app, [getattr(node.keys, by)]) if by is not None else app)
    good = signed_app(app, [node.keys.publisher])
    changes: list[dict[str, Any]] = [
        {"bundle": BlobRef(digest="b" * 64, size_bytes=1)},
        {"name": "dig-2"},
        {"wheels": {"evil-1-py3-none-any.whl": app.bundle}},
        {"requirements": ["evil"]},
    ]
    for change in changes:
        with pytest.raises(Untrusted):
            await node.trust.app(good.model_copy(update=change))
    with pytest.raises(Untrusted):
        await node.trust.app(signed_app(app.model_copy(update={"name": "other"}), [node.keys.publisher]))


async def test_a_hostile_coordinator_delegates_nothing_to_itself(tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    before = node.store.chain
    assert before is not None
    for thief in (node.keys.director, node.keys.timestamp, STRANGER.root):
        node.line.told_of = node.line.published.delegating(1, STRANGER, by=thief).metadata
        await node.trust.orders()
        assert node.store.chain is not None
        assert node.store.chain.files.targets == before.files.targets
    node.line.told_of = replace(node.line.published, keys=STRANGER).rooted(1, STRANGER).metadata
    await node.trust.orders()
    assert node.store.chain.files.root == before.files.root


async def test_a_mirror_that_holds_back_what_is_new_freezes_nothing_for_longer_than_a_week(tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    node.store.told(NOW.timestamp() + 8 * 86_400)
    with pytest.raises(Untrusted) as refused:
        await node.trust.desired(signed(DESIRED, desired(), node.keys.director))
    assert refused.value.kind == "freeze"
    node.line.published = node.line.published.vouched(8)
    node.trust._link._asked = None  # it asks again after a pause
    await node.trust.desired(signed(DESIRED, desired(), node.keys.director))


async def test_a_mirror_tells_no_time_and_no_old_truth(tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    heard: list[Received] = []

    def record(answer: Received) -> Received:
        heard.append(answer)
        return answer

    node.line.alters = record
    await node.trust.orders()
    before = node.store.now()

    def another_time(answer: Received) -> Received:
        body = {**json.loads(answer.data), "now": NOW.timestamp() + 300 * 86_400}
        return replace(answer, data=json.dumps(body).encode())

    for alters in (another_time, lambda answer: heard[0], lambda answer: replace(answer, headers={})):
        node.line.alters = alters
        _, is_believed = await node.trust.orders()
        assert not is_believed
    assert abs(node.store.now() - before) < 10


async def test_keys_that_were_replaced_are_asked_for_and_then_count(tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    old = node.keys
    node.line.published = node.line.published.delegating(1, Keys())
    node.trust._link._asked = None
    await node.trust.desired(signed(DESIRED, desired(), node.keys.director))
    with pytest.raises(Untrusted) as refused:
        await node.trust.desired(signed(DESIRED, desired(), old.director))
    assert refused.value.kind == "unknown_signer"
    order = task()
    with pytest.raises(Untrusted):  # nor what they have given a mandate for
        await node.trust.order(Received(TASK, to_json(order), aggregator(old).headers(TASK, to_json(order))), order)


async def test_a_question_is_answered_once_it_is_asked_and_not_when_it_is_sent_again(tmp_path: Path) -> None:
    node = await node_of(tmp_path)

    async def answers(_: Received) -> tuple[bytes, dict[str, str]]:
        return b"an answer", {}

    asking, subject = node.trust.guarded(answers), SUBJECTS.samples("eu", "n1", "digits")
    now = node.store.now()
    good = signed(subject, b"{}", node.keys.director, at=f"{now}")
    assert await asking(good) == (b"an answer", {})
    for bad in (
        Received(subject, b"{}", {}),
        replace(good, headers={**good.headers, AT: f"{now + 1}"}),
        signed(subject, b"{}", node.keys.director),
        signed(subject, b"{}", node.keys.director, at="yesterday"),
        signed(subject, b"{}", node.keys.director, at="nan"),
        signed(subject, b"{}", node.keys.director, at=f"{now - 3600}"),
        signed(subject, b"{}", node.keys.releases, at=f"{now}"),
        replace(good, subject=SUBJECTS.samples("eu", "n1", "other")),
    ):
        data, headers = await asking(bad)
        assert STATUS in headers, data


async def test_the_same_refusal_is_told_once_in_a_while(tmp_path: Path) -> None:
    node = await node_of(tmp_path)
    for _ in range(5):
        with pytest.raises(Untrusted):
            await node.trust.desired(Received(DESIRED, to_json(desired()), {}))
    assert node.refused() == [("desired", "arbitrary")]
