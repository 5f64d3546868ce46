"""Two tenants beside an installation: one coordinator and one hub for all, and nothing crosses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedtide.console import endpoints
from fedtide.coordinator.release_authority.__main__ import ReleaseAuthority
from fedtide.coordinator.release_authority.config import AuthorityConfig
from fedtide.fabric.trust import keys
from fedtide.fabric.trust.keys import public_pem
from tests.conftest import APPS, EXAMPLES
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.tenant_edge import TenantEdge


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    there = bring_up(tmp_path_factory.mktemp("host"), "eu", 2, "--room", "4GB")
    yield there
    there.run("down")


def _add(host: Installation, name: str, *options: str) -> Installation:
    added = host.run("tenant", "add", name, "--region", "eu", "--bytes", "400MB", *options)
    assert added.returncode == 0, added.stderr
    until(lambda: host.json("tenant", "show", name)["state"] == "served", f"tenant {name}")
    return Installation(host.home, name)


@pytest.fixture(scope="module")
def acme(host: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TenantEdge]:
    tenant = _add(host, "acme", "--nodes", "2", "--runs", "1")
    with TenantEdge(tenant, "eu", tmp_path_factory.mktemp("acme")) as edge:
        edge.start_release_authority()
        edge.start_agent("one")
        edge.start_agent("two")
        until(lambda: sum(n.state == "online" for n in edge.tenant.nodes()) == 2, "the nodes of acme")
        yield edge


@pytest.fixture(scope="module")
def globex(host: Installation) -> Installation:
    return _add(host, "globex")


def _call(url: str, token: str, path: str) -> httpx.Response:
    return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {token}"} if token else {})


def _url(of: Installation) -> str:
    base: str = of.state["apis"][0]
    return f"{base}/tenants/{of.tenant}" if of.tenant else base


def _token(of: Installation) -> str:
    return of.shown["Authorization"].removeprefix("Bearer ")


def test_each_trains_and_sees_its_own(host: Installation, acme: TenantEdge, globex: Installation) -> None:
    own = host.train(APPS / "mean", "--rounds", "1", "--model", "m")
    theirs = acme.tenant.train(APPS / "mean", "--rounds", "2", "--model", "m")
    assert (own.state, theirs.state) == ("completed", "completed"), acme.log_of("one")
    assert [run.run for run in host.runs()] == [own.run]
    assert [run.run for run in acme.tenant.runs()] == [theirs.run]
    assert globex.runs() == []
    assert [node.name for node in acme.tenant.nodes()] == ["one", "two"]
    assert [node.name for node in host.nodes()] == ["eu-1", "eu-2"]
    for seen, of, other in ((host, own, theirs), (acme.tenant, theirs, own)):
        said = json.dumps([event.model_dump(mode="json") for event in seen.events()])
        assert of.run in said
        assert other.run not in said
        lines = [line.model_dump_json() for line in seen.client.every(endpoints.cost_lines())]
        assert any(of.run in line for line in lines)
        assert not any(other.run in line for line in lines)
    for there in (host, acme.tenant):
        metrics = _call(_url(there), _token(there), "/metrics").text
        assert "fedtide_" in metrics
        assert 'node="one"' not in metrics or there.tenant
    assert acme.tenant.run("run", "show", own.run).returncode != 0
    trail = acme.tenant.run("audit", "verify")
    assert "whole" in trail.stdout, trail.stderr


def test_a_token_is_good_for_its_own_tenant_only(host: Installation, acme: TenantEdge, globex: Installation) -> None:
    base = host.state["apis"][0]
    tokens = {"host": _token(host), "acme": _token(acme.tenant), "globex": _token(globex), "none": ""}
    made = acme.tenant.run("token", "create", "ci", "--role", "admin").stdout.strip()
    places = {"host": base, "acme": f"{base}/tenants/acme", "globex": f"{base}/tenants/globex"}
    for whose, token in {**tokens, "acme's program": made}.items():
        for where, url in places.items():
            for path in ("/v1/runs", "/v1/status", "/v1/whoami", "/v1/audit", "/ui/"):
                answer = _call(url, token, path)
                belongs = whose.split("'")[0] == where
                refused = answer.status_code == 401 or "login" in answer.headers.get("Location", "")
                assert refused is not belongs, (whose, where, path, answer.status_code)
    for path in ("/v1/runs", "/metrics"):
        strangers = {_call(f"{base}/tenants/{name}", tokens["host"], path).status_code for name in ("acme", "nobody")}
        assert strangers == {401}, "a wrong token learns nothing more of one that is there"
    assert _call(places["acme"], tokens["acme"], "/v1/tenants").status_code == 404
    assert _call(places["acme"], tokens["acme"], "/v1/whoami").json()["role"] == "admin"
    assert _call(places["acme"], tokens["acme"], "/ui/").status_code == 200


def test_a_quota_holds(host: Installation, acme: TenantEdge) -> None:
    tenant = acme.tenant
    acme.start_agent("three")
    until(lambda: "quota of 2 nodes is used up" in acme.log_of("three"), "the refusal")
    assert len(tenant.nodes()) == 2

    first = tenant.json("run", "start", "--app", str(APPS / "mean"), "--rounds", "100000")["run"]
    second = tenant.run("run", "start", "--app", str(APPS / "mean"), "--rounds", "1")
    assert second.returncode != 0
    assert "quota of 1 runs at a time" in second.stderr
    shown = host.json("tenant", "show", "acme")
    assert (shown["used"]["runs"], shown["used"]["nodes"]) == (1, 2)
    assert 0 < shown["used"]["bytes"] <= shown["quota"]["bytes"]
    tenant.run("run", "cancel", first)
    tenant.finish(first)

    quota = host.run("tenant", "quota", "acme", "--nodes", "3", "--runs", "3")
    assert quota.returncode == 0, quota.stderr
    again = tenant.json("run", "start", "--app", str(APPS / "mean"), "--rounds", "1")["run"]
    assert tenant.finish(again).state == "completed"


def test_more_than_the_hub_has_is_promised_to_nobody(host: Installation, acme: TenantEdge) -> None:
    for words in (("add", "large", "--region", "eu"), ("quota", "acme")):
        refused = host.run("tenant", *words, "--bytes", "20GB")
        assert refused.returncode != 0
        assert "more than the hub has left" in refused.stderr
    assert not (host.home / "tenants" / "large").exists()
    # Less, and more again: streams are made smaller before the account is.
    for size, bytes_ in (("150MB", 150 * 10**6), ("400MB", 400 * 10**6)):
        assert host.run("tenant", "quota", "acme", "--bytes", size).returncode == 0
        until(lambda: host.json("tenant", "show", "acme")["state"] == "served", "acme")
        until(lambda limit=bytes_: 0 < _reserved(acme.tenant) <= limit, f"streams of {size}")
    assert acme.tenant.train(APPS / "mean", "--rounds", "1").state == "completed"


def _reserved(tenant: Installation) -> int:
    """Bytes that a tenant's streams may have at the hub."""
    answer = _call(_url(tenant), _token(tenant), "/v1/storage")
    if answer.status_code != 200:
        return 0
    return sum(each["max_bytes"] for each in answer.json()["streams"] if each["region"] == "hub")


def test_its_director_gets_another_key_and_no_key_is_overwritten(host: Installation, acme: TenantEdge) -> None:
    tenant, folder = acme.tenant, host.home / "tenants" / "acme" / "trust"
    assert "PRIVATE" not in (folder / "director.pem").read_text()
    refused = tenant.run("trust", "rotate", "director")
    assert "fedtide tenant keys" in refused.stderr
    assert host.run("tenant", "keys", "acme", str(folder / "director-2.pem")).returncode == 0
    until(lambda: host.json("tenant", "show", "acme")["state"] == "served", "acme")
    public = folder / "director-2.pub.pem"
    public.write_text(public_pem(folder / "director-2.pem"))
    done = tenant.run("trust", "rotate", "director", "--key", str(public))
    assert done.returncode == 0, done.stderr
    assert tenant.train(APPS / "mean", "--rounds", "1").state == "completed"
    other = folder.parent / "director-2.pem"
    keys.save(keys.new(), other)
    assert "is there already" in host.run("tenant", "keys", "acme", str(other)).stderr
    other.write_text("no key")
    assert host.run("tenant", "keys", "acme", str(other)).returncode != 0


def test_what_only_the_installation_may_do(host: Installation, acme: TenantEdge, tmp_path: Path) -> None:
    tenant = acme.tenant
    for words in (("tenant", "ls"), ("backup", str(tmp_path / "x.tar"))):
        assert "FEDTIDE_TENANT" in tenant.run(*words).stderr
    tracked = tenant.run("run", "start", "--app", str(APPS / "mean"), "--track", "mlflow=http://127.0.0.1:9")
    assert "reported nowhere else" in tracked.stderr
    said = host.run("events", "query", "--kind", "tenant.*", "--limit", "100").stdout
    assert "tenant acme was added" in said
    viewer = host.run("token", "create", "looks", "--role", "viewer").stdout.strip()
    shown = _call(host.state["apis"][0], viewer, "/v1/events?kind=tenant.*").text
    assert "sealed" not in shown
    assert _call(host.state["apis"][0], viewer, "/v1/tenants").status_code == 403
    assert host.run("tenant", "regions", "acme", "--region", "a/b").returncode != 0
    lines = list(tenant.client.every(endpoints.cost_lines()))
    assert lines
    assert not [line for line in lines if line.phase == "coordinate"], "the process is the installation's to pay"


def test_a_browser_may_look_at_both_pages(host: Installation, acme: TenantEdge) -> None:
    base = host.state["apis"][0]
    with httpx.Client(base_url=base) as browser:
        for of, where in ((acme.tenant, "/tenants/acme"), (host, "")):
            browser.post(f"{where}/ui/login", files={"token": (None, _token(of))})
        for where in ("/tenants/acme/ui/", "/ui/", "/tenants/acme/ui/fleet"):
            assert browser.get(where).status_code == 200, where
        moved = browser.get("/tenants/acme")
        assert (moved.status_code, moved.headers["Location"]) == (308, "/tenants/acme/")


def test_its_owner_takes_the_folder_away(host: Installation, acme: TenantEdge, tmp_path: Path) -> None:
    shutil.copytree(host.home / "tenants" / "acme", tmp_path / "tenants" / "acme")
    environment = {"FEDTIDE_HOME": str(tmp_path), "FEDTIDE_TENANT": "acme", "FEDTIDE_SERVER": host.state["apis"][0]}
    done = subprocess.run(
        [sys.executable, "-m", "fedtide.console.cli", "whoami", "-o", "json"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert json.loads(done.stdout)["role"] == "admin", done.stderr
    config = tmp_path / "tenants" / "acme" / "release-authority.json"
    found = AuthorityConfig.model_validate_json(config.read_bytes()).below(config.parent)
    assert all(path.is_relative_to(tmp_path) for path in (found.roots, found.folder, Path(found.key)))
    ReleaseAuthority(found)


@pytest.mark.slow
def test_money_is_counted_by_the_installations_prices(host: Installation, acme: TenantEdge, tmp_path: Path) -> None:
    tenant, prices = acme.tenant, tmp_path / "prices.yaml"
    prices.write_text('currency: EUR\nprices: [{meter: rounds, price: "7", per: "1"}]\n')
    refused = tenant.run("price", "apply", str(prices))
    assert "those of the installation" in refused.stderr
    assert host.run("price", "apply", str(prices)).returncode == 0
    until(lambda: tenant.json("price", "show")["prices"] != [], "the prices")
    assert host.run("tenant", "quota", "acme", "--money", "1").returncode == 0
    until(lambda: [b["budget"]["name"] for b in tenant.json("budget", "ls")] == ["quota"], "the budget")
    assert "what the installation lets you spend" in tenant.run("budget", "rm", "quota").stderr
    run = tenant.json("run", "start", "--app", str(APPS / "mean"), "--rounds", "3")["run"]
    held = tenant.until_run(run, lambda view: "budget quota" in view.reason)
    assert held.state not in ("completed", "failed")
    assert host.run("tenant", "quota", "acme", "--unlimited", "money").returncode == 0
    assert tenant.finish(run).state == "completed"


@pytest.mark.slow
def test_a_coordinator_that_is_killed_serves_all_of_them_again(
    host: Installation, acme: TenantEdge, globex: Installation
) -> None:
    run = acme.tenant.json("run", "start", "--app", str(APPS / "mean"), "--rounds", "30")["run"]
    acme.tenant.until_run(run, lambda view: len(view.rounds) > 1)
    os.kill(host.child("coordinator"), signal.SIGKILL)
    until(lambda: acme.tenant.run("run", "show", run).returncode == 0, "the tenant's API")
    assert acme.tenant.finish(run).state == "completed"
    until(lambda: globex.run("run", "ls").returncode == 0, "that of the other")


@pytest.mark.slow
def test_its_releases_are_vouched_for_by_its_own_authority(host: Installation, acme: TenantEdge) -> None:
    run = acme.tenant.train(EXAMPLES / "sensors", "--rounds", "1", "--model", "sensors")
    assert run.state == "completed", run.reason
    until(lambda: acme.tenant.model("sensors").releases != [], "the release")
    told = acme.tenant.run("model", "verify", "sensors@1")
    assert "verified" in told.stdout, told.stderr
    started = acme.tenant.run("rollout", "start", "sensors", "--watch")
    assert started.returncode == 0, started.stdout
    # The same bytes under the root of another are nothing.
    other = str(host.home / "trust" / "trust-roots.json")
    assert acme.tenant.run("model", "verify", "sensors@1", "--root", other).returncode != 0


@pytest.mark.slow
def test_a_backup_holds_them_too(host: Installation, acme: TenantEdge, tmp_path: Path) -> None:
    run = acme.tenant.train(APPS / "mean", "--rounds", "1", "--model", "kept")
    file = tmp_path / "backup.tar"
    assert host.run("backup", str(file)).returncode == 0
    elsewhere = Installation(tmp_path / "elsewhere")
    restored = elsewhere.process("restore", str(file), timeout_s=120)
    assert restored.returncode == 0, restored.stderr
    assert "vouches for releases is in no backup" in restored.stdout
    again = bring_up(elsewhere.home, "eu", 1, "--room", "4GB")
    try:
        until(lambda: elsewhere.json("tenant", "show", "acme")["state"] == "served", "the tenant")
        shutil.copytree(host.home / "tenants", elsewhere.home / "tenants")
        there = Installation(elsewhere.home, "acme")
        assert there.show(run.run).state == "completed"
        assert there.events(kind="log.restored")
        assert "whole" in there.run("audit", "verify").stdout
    finally:
        again.run("down")


@pytest.mark.slow
def test_one_that_cannot_be_served_holds_up_no_other(host: Installation, acme: TenantEdge) -> None:
    broken = _add(host, "broken")
    (folder,) = (host.home / "coordinator" / "tenants").glob("broken-*")
    # A region that it has not, and never gets: its servers do not exist. Others go on.
    assert "region eu is not served" in " ".join(broken.json("status")["warnings"])
    assert acme.tenant.train(APPS / "mean", "--rounds", "1").state == "completed"
    gone = host.run("tenant", "rm", "broken", "--yes")
    assert gone.returncode == 0, gone.stderr
    until(lambda: "broken" not in json.dumps(host.json("tenant", "ls")), "the removal")
    assert broken.run("run", "ls").returncode != 0
    assert not folder.exists(), "its keys are gone"


@pytest.mark.slow
def test_who_is_removed_is_let_in_nowhere_and_a_later_one_of_its_name_is_another(
    host: Installation, globex: Installation, tmp_path: Path
) -> None:
    with TenantEdge(globex, "eu", tmp_path) as edge:
        old = _token(globex)
        assert host.run("tenant", "remove", "globex", "--yes").returncode == 0
        until(lambda: "globex" not in json.dumps(host.json("tenant", "ls")), "the removal")
        until(lambda: "Authorization Violation" in edge.log_of("leaf"), "that its server is not let in")
        (host.home / "tenants" / "globex").rename(tmp_path / "old-keys")
        before = len(edge.log_of("leaf"))
        again = _add(host, "globex")
        assert again.runs() == []
        assert _call(_url(again), old, "/v1/runs").status_code == 401
        until(lambda: "Authorization Violation" in edge.log_of("leaf")[before:], "that it is not let in still")


def test_bad_input_is_refused_with_what_to_do(host: Installation, acme: TenantEdge, tmp_path: Path) -> None:
    for words, said in (
        (("tenant", "add", "Acme!", "--region", "eu"), "name"),
        (("tenant", "add", "default", "--region", "eu"), "installation itself"),
        (("tenant", "add", "other"), "regions"),
        (("tenant", "add", "other", "--region", "eu", "--bytes", "lots"), "no size"),
        (("tenant", "add", "other", "--region", "eu", "--trust", str(tmp_path)), "trust init"),
        (("tenant", "show", "nobody"), "no tenant 'nobody'"),
        (("tenant", "quota", "nobody", "--runs", "1"), "no tenant 'nobody'"),
        (("tenant", "rm", "nobody", "--yes"), "no tenant 'nobody'"),
    ):
        done = host.run(*words)
        assert done.returncode not in (0, 70), (words, done.stderr)
        assert said in done.stderr, (words, done.stderr)
    assert host.run("tenant", "add", "acme", "--region", "eu").returncode != 0
    assert not (host.home / "tenants" / "other").exists()
