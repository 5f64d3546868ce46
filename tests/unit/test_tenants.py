"""Tenants: what the log says of them, what their coordinators are told, and quotas."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedtide.coordinator.adapters.tenant_keys import TenantKeys, config_of
from fedtide.coordinator.bookkeeping import QUOTA
from fedtide.coordinator.config import CoordinatorConfig, Kubernetes, Oidc, Prometheus, TenantRoles, Webhook
from fedtide.coordinator.identity.tenants import Tenant, of_added, step
from fedtide.coordinator.state import UNLIMITED, World
from fedtide.fabric.errors import ConfigError, InvalidTransition, NotFound
from fedtide.fabric.events.identity import JoinTokenCreated, NodeEnrolled, NodeRevoked
from fedtide.fabric.events.runs import RunCancelRequested
from fedtide.fabric.events.tenants import QuotaSet, TenantAdded, TenantChanged, TenantForgotten, TenantRemoved
from fedtide.fabric.messages.tenants import Quota, QuotaChange, TenantRequest
from fedtide.fabric.nats.authority import Authority
from tests.scenarios import build as b

AT = datetime(2026, 11, 27, tzinfo=UTC)
FAR = datetime(2030, 1, 1, tzinfo=UTC)
ADDED = TenantAdded(tenant="acme", nonce="n1" * 16, regions=["eu"], quota=Quota(), sealed="x")


def _after(*events: object) -> dict[str, Tenant]:
    state: dict[str, Tenant] = {}
    for event in events:
        state = step(state, event, AT)
    return state


def test_what_is_changed_changes_and_the_rest_stays() -> None:
    changed = _after(ADDED, TenantChanged(tenant="acme", quota=Quota(runs=2)), TenantChanged(tenant="acme", sealed="y"))
    (tenant,) = changed.values()
    assert (tenant.regions, tenant.quota.runs, tenant.sealed) == (("eu",), 2, "y")
    again = of_added(tenant.as_added_now(), AT)
    assert (again.name, again.regions, again.quota, again.sealed) == ("acme", ("eu",), tenant.quota, "y")


def test_one_that_leaves_is_there_until_nothing_is_stored_of_it() -> None:
    leaving = _after(ADDED, TenantRemoved(tenant="acme"))
    assert leaving["acme"].is_leaving
    with pytest.raises(InvalidTransition):
        step(leaving, ADDED, AT)
    with pytest.raises(InvalidTransition, match="being removed"):
        step(leaving, TenantChanged(tenant="acme", regions=["us"]), AT)
    assert step(leaving, TenantForgotten(tenant="acme", nonce="another"), AT) == leaving
    assert step(leaving, TenantForgotten(tenant="acme", nonce=ADDED.nonce), AT) == {}
    with pytest.raises(NotFound):
        step({}, TenantRemoved(tenant="acme"), AT)


@pytest.mark.parametrize("name", ["", "Acme", "-a", "a-", "a.b", "a" * 21, "a/b", "ä"])
def test_a_name_can_stand_in_a_path_a_subject_and_a_job(name: str) -> None:
    with pytest.raises(ValidationError):
        TenantRequest(name=name, regions=["eu"], files={})


def test_a_quota_is_lifted_by_name_and_changed_field_by_field() -> None:
    before = Quota(nodes=1, runs=2, bytes=10**9, money=Decimal(5))
    assert QuotaChange(runs=7).applied_to(before) == before.model_copy(update={"runs": 7})
    assert QuotaChange(unlimited=["money", "nodes"]).applied_to(before) == Quota(runs=2, bytes=10**9)
    with pytest.raises(ValidationError):
        Quota(money=Decimal("NaN"))


def _limited(**quota: object) -> b.Story:
    story = b.Story()
    story.tell(QuotaSet(quota=Quota.model_validate(quota)))
    return story


def test_runs_at_a_time() -> None:
    story = _limited(runs=1)
    story.tell(b.requested("run-1"))
    with pytest.raises(InvalidTransition, match="quota of 1 runs"):
        story.tell(b.requested("run-2"))
    story.tell(RunCancelRequested(run="run-1"))
    story.tell(b.requested("run-2"))


def test_nodes_with_credentials() -> None:
    story = _limited(nodes=1)

    def enrol(node: str) -> None:
        story.tell(NodeEnrolled(node=node, region="eu", key=f"U{node}", expires_at=FAR, token="t"))

    story.tell(JoinTokenCreated(token="t", key="UT", region="", uses=9, expires_at=FAR, replaces=True))
    enrol("a")
    enrol("a")
    with pytest.raises(InvalidTransition, match="quota of 1 nodes"):
        enrol("b")
    story.tell(NodeRevoked(node="a", reason=""))
    enrol("b")


def test_money_is_a_budget_that_holds_and_goes_with_the_quota() -> None:
    story = _limited(money="12.5")
    (kept,) = story.world.budgets.values()
    assert (kept.budget.name, kept.budget.amount, kept.budget.when_spent) == (QUOTA, Decimal("12.5"), "hold")
    story.tell(QuotaSet(quota=UNLIMITED))
    assert not story.world.budgets
    assert World().quota == UNLIMITED


def test_a_tenants_coordinator_gets_no_channel_server_or_role_of_the_installation(tmp_path: Path) -> None:
    host = CoordinatorConfig(
        nats_url="nats://127.0.0.1:1",
        regions=["here"],
        notify={"ops": Webhook(url_file=tmp_path / "url")},
        prometheus={"main": Prometheus(url="http://127.0.0.1:9090")},
        http_token_file=tmp_path / "token",
        oidc=Oidc(
            issuer="https://login.example",
            roles={"ops": "admin"},
            default_role="viewer",
            tenants={"acme": TenantRoles(roles={"acme-ml": "operator"})},
        ),
        kubernetes=Kubernetes(namespace="fl", image="i", release="ft"),
        endpoint_file=tmp_path / "up.json",
    )
    acme = config_of(host, of_added(ADDED.model_copy(update={"namespace": "acme-jobs"}), AT), tmp_path / "acme")
    assert (acme.tenant, acme.regions, acme.notify, acme.prometheus) == ("acme", ["eu"], {}, {})
    assert acme.endpoint_file is None
    assert acme.http_token_file == tmp_path / "acme" / "identity" / "api-token"
    assert acme.oidc is not None
    assert (acme.oidc.roles, acme.oidc.default_role) == ({"acme-ml": "operator"}, None)
    assert acme.kubernetes is not None
    assert (acme.kubernetes.tenant, acme.kubernetes.namespace) == ("acme", "acme-jobs")
    other = config_of(host, of_added(ADDED.model_copy(update={"tenant": "globex"}), AT), tmp_path)
    assert other.oidc is not None
    assert (other.oidc.roles, other.oidc.default_role) == ({}, None)


def test_keys_that_another_installation_has_sealed_are_not_opened(tmp_path: Path) -> None:
    config = CoordinatorConfig(nats_url="nats://127.0.0.1:1", regions=["eu"], data_dir=tmp_path)
    ours, theirs = (TenantKeys(config, Authority.create("default")[0]) for _ in range(2))
    tenant = of_added(ADDED.model_copy(update={"sealed": ours.sealed({"director.pem": "secret"})}), AT)
    assert ours.files_of(tenant) == {"director.pem": "secret"}
    assert "secret" not in tenant.sealed
    with pytest.raises(ConfigError, match="another authority"):
        theirs.files_of(tenant)
