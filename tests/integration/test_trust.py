"""A whole installation that believes nobody: hostile orders, releases that are vouched for, keys that are replaced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtide.console import endpoints
from fedtide.console.client import ApiError
from fedtide.fabric.encoding import to_json
from fedtide.fabric.flower.app_files import bundle
from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.plans.rollout_plan import Desired
from fedtide.fabric.plans.run_spec import AppRef, RunRequest
from fedtide.fabric.tensors.blobs import BlobRef
from tests.conftest import APPS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.releases import release, trained_release

SUBJECTS = Subjects()


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One region of two nodes, which nobody else uses: its keys change."""
    made = bring_up(tmp_path_factory.mktemp("trust"), "eu", 2, "--regional-aggregators")
    yield made
    made.run("down")


def _ran(there: Installation, *words: str) -> str:
    done = there.run(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def _order(there: Installation, subject: str, body: bytes, headers: dict[str, str]) -> None:
    broker = await there.hub.connect("hostile-coordinator")
    await broker.publish(subject, body, headers=headers)
    await broker.close()


def test_who_holds_the_coordinators_credentials_orders_nothing_without_the_directors_key(there: Installation) -> None:
    wanted = Desired(model="evil", counter=1, rollout="r", release=BlobRef(digest="a" * 64, size_bytes=1))
    asyncio.run(_order(there, SUBJECTS.desired("eu", "eu-1", "evil"), to_json(wanted), {}))
    until(lambda: there.node("eu-1").refused == {"arbitrary": 1}, "that the node tells of it")
    (event,) = there.until_events("node.refused", "eu-1")
    assert event.data["what"] == "desired"
    assert not list((there.home / "nodes" / "eu-1" / "models" / "current").iterdir())
    metrics = there.client._http.get(f"{there.state['apis'][0]}/metrics").text
    assert 'fedtide_orders_refused_total{kind="arbitrary"} 1.0' in metrics


def test_an_app_that_nobody_has_signed_is_not_started(there: Installation) -> None:
    ref = there.client.send(endpoints.put_bundle(bundle(APPS / "mean")))
    with pytest.raises(ApiError, match="not signed"):
        there.client.send(endpoints.start_run(RunRequest(app=AppRef(name="mean", bundle=ref), rounds=1)))


def test_a_release_is_vouched_for_and_verified_anywhere(there: Installation, tmp_path: Path) -> None:
    version = trained_release(there, 2.0)
    copy, root = tmp_path / "copy", tmp_path / "root.json"
    assert "signed" in _ran(there, "model", "pull", "scale", "--folder", str(copy))
    root.write_text(json.loads((there.home / "trust" / "trust-roots.json").read_text())[0])
    told = json.loads(_ran(there, "model", "verify", "--folder", str(copy), "--root", str(root), "-o", "json"))
    assert (told["release"], told["signed by"]) == (f"scale@{version}", ["releases"])
    said = told["statement"]["predicate"]
    assert said["buildDefinition"]["externalParameters"]["app"]["name"] == "mean"
    assert len(said["buildDefinition"]["internalParameters"]["merkleRoot"]) == 64
    assert said["runDetails"]["byproducts"]
    assert "verified" in _ran(there, "model", "verify", f"scale@{version}")

    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes() + b"x")
    assert there.run("model", "verify", "--folder", str(copy)).returncode != 0
    _ran(there, "model", "pull", "scale", "--folder", str(copy))
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text().replace("scale", "other"))
    assert "wrong target" in there.run("model", "verify", "--folder", str(copy)).stderr
    other = tmp_path / "another"
    _ran(there, "trust", "init", str(other))
    _ran(there, "model", "pull", "scale", "--folder", str(copy))
    refused = there.run("model", "verify", "--folder", str(copy), "--root", str(other / "trust-roots.json"))
    assert refused.returncode != 0


def test_what_a_node_has_influenced_and_how_to_go_on_without_it(there: Installation) -> None:
    first = release(there, 3.0)
    tainted = trained_release(there, 4.0)
    _ran(there, "rollout", "start", "scale", "--version", str(tainted), "--watch")
    lineage = json.loads(_ran(there, "model", "lineage", f"scale@{tainted}", "-o", "json"))
    assert sorted(lineage["served_by"]) == ["eu-1", "eu-2"]
    view = json.loads(_ran(there, "fleet", "quarantine", "eu-1", "--reason", "it was stolen", "-o", "json"))
    assert tainted in [each["version"] for each in view["releases"] if each["model"] == "scale"]
    assert {each["node"] for each in view["served"]} == {"eu-1", "eu-2"}
    (proposal,) = view["proposals"]
    assert proposal["roll_back_to"] == first
    assert "--version" in proposal["roll_back"][0]
    run = there.json("run", "start", "--app", str(APPS / "mean"))["run"]
    there.until_run(run, lambda view: "its cohort has 1" in view.reason)  # Flower wants two
    _ran(there, "run", "cancel", run)
    assert "quarantined" in there.node("eu-1").warnings[0]
    _ran(there, "fleet", "quarantine", "eu-1", "--lift")
    (asked, lifted) = there.until_events("node.quarantined", "eu-1", 2)[-2:]
    assert {asked.data["reason"], lifted.data["reason"]} == {"it was stolen", ""}


def test_a_region_folds_for_runs_that_have_a_mandate(there: Installation) -> None:
    view = there.train(APPS / "sums", "--policy", "regional=true")
    assert view.state == "completed", view.reason
    log = (there.home / "logs" / "regional-eu.log").read_text()
    assert "fold.forwarded" in log
    assert "fold.failed" not in log


def test_a_node_that_was_away_while_all_keys_were_replaced_comes_back_and_follows(there: Installation) -> None:
    release(there, 5.0)
    away = there.child("agent-eu-2")
    os.kill(away, signal.SIGSTOP)
    try:
        until(lambda: there.node("eu-2").state == "offline", "that it is missed")
        for role in ("root", "timestamp", "director", "publisher-owner"):
            _ran(there, "trust", "rotate", role)
        keys = {role: view.keys for view in there.client.send(endpoints.trust()).roles for role in [view.role]}
        assert len(keys) == 3
    finally:
        os.kill(away, signal.SIGCONT)
    until(lambda: there.node("eu-2").state == "online", "that it is back")
    trust = there.client.send(endpoints.trust())
    assert trust.pin.startswith("3:")
    done = there.run("rollout", "start", "scale", "--watch")
    assert done.returncode == 0, done.stderr + done.stdout
    pins = [(there.home / "nodes" / node / "trust" / "history").read_text().split()[-1] for node in ("eu-1", "eu-2")]
    assert pins == [trust.pin, trust.pin]
    signing = there.home / "trust" / "publisher-owner.pem"
    os.replace(signing, there.home / "trust" / "publisher.pem")
    assert there.train(APPS / "mean", "--rounds", "1").state == "completed"


def test_metadata_that_are_wrong_are_refused_and_change_nothing(there: Installation) -> None:
    before = there.client.send(endpoints.trust())
    known = before.metadata
    changed = known.targets.replace("orders/*/*", "orders/eu/*")
    signed = json.loads(changed)
    signed["signed"]["version"] += 1
    for offered, why in (
        (TrustMetadata(targets="nonsense"), "no TUF metadata"),
        (TrustMetadata(roots=known.roots[:1], targets=changed), "other metadata"),
        (TrustMetadata(roots=known.roots[:1], targets=json.dumps(signed)), "lack"),
        (TrustMetadata(roots=[known.roots[0].replace("root", "r00t")]), "no TUF metadata"),
        (TrustMetadata(roots=[known.targets]), "of type targets"),
    ):
        with pytest.raises(ApiError, match=why):
            there.client.send(endpoints.publish_trust(offered))
    assert there.client.send(endpoints.trust()).metadata == known
    refused = there.run("trust", "revoke", "director")
    assert refused.returncode != 0
    assert "no node would follow it" in refused.stderr
