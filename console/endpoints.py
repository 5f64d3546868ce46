"""The API's calls as data: method, path, body, and how the answer is read. Pure.

The sync and the async client send the same calls. Names are quoted into paths here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Generic, Literal, TypeVar
from urllib.parse import parse_qsl, quote, urlencode

from pydantic import BaseModel, TypeAdapter

from fedtide.fabric.messages import requests
from fedtide.fabric.messages import views as v
from fedtide.fabric.messages.cost_views import BudgetView, CostLine, CostView
from fedtide.fabric.messages.logs import LogPage
from fedtide.fabric.messages.people import (
    AuditEntry,
    LoginView,
    NewServiceToken,
    PrincipalView,
    ServiceTokenRequest,
    ServiceTokenView,
)
from fedtide.fabric.messages.tenants import NewTenant, QuotaChange, TenantChange, TenantRequest, TenantView
from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.plans.prices import Budget, PriceBook
from fedtide.fabric.plans.rollout_request import RolloutRequest
from fedtide.fabric.plans.run_spec import RunRequest
from fedtide.fabric.plans.trigger_rule import TriggerRule
from fedtide.fabric.tensors.blobs import BlobRef

T = TypeVar("T")
Query = Mapping[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request; `answer` decodes the response (see `is_raw` for bytes)."""

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    answer: TypeAdapter[T]
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    starts_something: bool = False
    """Whether it starts something: then it carries an idempotency key, so that a retry starts nothing new."""


_BYTES: TypeAdapter[bytes] = TypeAdapter(bytes)


def is_raw(call: Call[T]) -> bool:
    """Whether the answer is raw bytes, not JSON."""
    return call.answer is _BYTES


def path(*parts: str, query: Query | None = None) -> str:
    """A path below `/v1`; whatever a part holds, it stays one part. What is None or empty is left out of the query."""
    found = "/v1/" + "/".join(quote(part, safe="") or "%20" for part in parts)
    given = {key: value for key, value in (query or {}).items() if value not in (None, "")}
    return f"{found}?{urlencode(given)}" if given else found


def _get(answer: type[T], *parts: str, query: Query | None = None) -> Call[T]:
    return Call("GET", path(*parts, query=query), TypeAdapter(answer))


def _post(
    answer: type[T], body: BaseModel | None, *parts: str, query: Query | None = None, starts: bool = False
) -> Call[T]:
    data = body.model_dump_json(exclude_defaults=True).encode() if body is not None else b""
    return Call("POST", path(*parts, query=query), TypeAdapter(answer), data, starts_something=starts)


def _put(answer: type[T], body: BaseModel, *parts: str) -> Call[T]:
    return Call("PUT", path(*parts), TypeAdapter(answer), body.model_dump_json(exclude_defaults=True).encode())


def next_page(listing: Call[v.Page[T]], after: str) -> Call[v.Page[T]]:
    """The page behind one that ended with `after`."""
    address, _, query = listing.path.partition("?")
    given = [(key, value) for key, value in parse_qsl(query) if key != "after"]
    return replace(listing, path=f"{address}?{urlencode([*given, ('after', after)])}")


def status() -> Call[v.StatusView]:
    return _get(v.StatusView, "status")


def storage() -> Call[v.StorageView]:
    return _get(v.StorageView, "storage")


def sweep(*, dry_run: bool, unused_for_s: float) -> Call[v.GarbageViews]:
    query: Query = {"dry_run": "true" if dry_run else None, "unused_for_s": unused_for_s}
    return _post(v.GarbageViews, None, "storage", "sweep", query=query)


def put_bundle(data: bytes) -> Call[BlobRef]:
    return Call("PUT", path("bundles"), TypeAdapter(BlobRef), data)


def nodes(**query: str | int | None) -> Call[v.Page[v.NodeView]]:
    return _get(v.Page[v.NodeView], "nodes", query=query)


def node(name: str) -> Call[v.NodeView]:
    return _get(v.NodeView, "nodes", name)


def infer(node: str, model: str, request: bytes, timeout_s: float, version: str = "") -> Call[bytes]:
    """One request of the Open Inference Protocol v2 to a node's model; the answer is the protocol's."""
    query: Query = {"timeout_s": timeout_s, "version": version}
    return Call("POST", path("nodes", node, "models", model, "infer", query=query), _BYTES, request)


def samples(node: str) -> Call[v.SamplesView]:
    return _get(v.SamplesView, "nodes", node, "samples")


def label_samples(node: str, model: str, asked: requests.LabelsRequest) -> Call[v.LabelsMatched]:
    return _post(v.LabelsMatched, asked, "nodes", node, "samples", model, "labels")


def forget_samples(node: str, model: str, asked: requests.ForgetRequest) -> Call[v.SamplesForgotten]:
    return _post(v.SamplesForgotten, asked, "nodes", node, "samples", model, "forget")


def runs(**query: str | int | None) -> Call[v.Page[v.RunView]]:
    return _get(v.Page[v.RunView], "runs", query=query)


def run(name: str) -> Call[v.RunView]:
    return _get(v.RunView, "runs", name)


def start_run(asked: RunRequest) -> Call[v.RunView]:
    return _post(v.RunView, asked, "runs", starts=True)


def act_on_run(name: str, action: requests.RunActionName, reason: str = "") -> Call[v.RunView]:
    return _post(v.RunView, _action(reason), "runs", name, action)


def remove_run(name: str) -> Call[v.RunView]:
    return Call("DELETE", path("runs", name), TypeAdapter(v.RunView))


def run_logs(name: str, node: str = "", after: datetime | None = None) -> Call[LogPage]:
    moment = after.isoformat() if after is not None else None
    return _get(LogPage, "runs", name, "logs", query={"node": node or None, "after": moment})


def watch_run(name: str) -> Call[v.RunView]:
    return _get(v.RunView, "runs", name, "watch")


def models(**query: str | int | None) -> Call[v.Page[v.ModelView]]:
    return _get(v.Page[v.ModelView], "models", query=query)


def model(name: str) -> Call[v.ModelView]:
    return _get(v.ModelView, "models", name)


def model_progress(name: str) -> Call[v.ModelProgress]:
    return _get(v.ModelProgress, "models", name, "progress")


def onnx(name: str, version: str) -> Call[bytes]:
    return Call("GET", path("models", name, "versions", version, "onnx"), _BYTES)


def rollouts(**query: str | int | None) -> Call[v.Page[v.RolloutView]]:
    return _get(v.Page[v.RolloutView], "rollouts", query=query)


def rollout(name: str) -> Call[v.RolloutView]:
    return _get(v.RolloutView, "rollouts", name)


def plan_rollout(asked: RolloutRequest) -> Call[v.PlannedRollout]:
    return _post(v.PlannedRollout, asked, "rollouts", "plan")


def start_rollout(asked: RolloutRequest) -> Call[v.RolloutView]:
    return _post(v.RolloutView, asked, "rollouts", starts=True)


def act_on_rollout(
    name: str, action: requests.RolloutActionName, reason: str = "", region: str = ""
) -> Call[v.RolloutView]:
    return _post(v.RolloutView, _action(reason, region), "rollouts", name, action)


def watch_rollout(name: str, *, through_pauses: bool = False) -> Call[v.RolloutView]:
    return _get(v.RolloutView, "rollouts", name, "watch", query={"through_pauses": "true" if through_pauses else None})


def triggers(**query: str | int | None) -> Call[v.Page[v.TriggerView]]:
    return _get(v.Page[v.TriggerView], "triggers", query=query)


def trigger(name: str) -> Call[v.TriggerView]:
    return _get(v.TriggerView, "triggers", name)


def apply_trigger(rule: TriggerRule) -> Call[v.TriggerView]:
    data = rule.model_dump_json(exclude_defaults=True).encode()
    return Call("PUT", path("triggers", rule.name), TypeAdapter(v.TriggerView), data)


def remove_trigger(name: str) -> Call[v.TriggerView]:
    return Call("DELETE", path("triggers", name), TypeAdapter(v.TriggerView))


def test_trigger(name: str, event: bytes) -> Call[v.TriggerTest]:
    return Call("POST", path("triggers", name, "test"), TypeAdapter(v.TriggerTest), event, _CLOUDEVENT)


def send_event(event: bytes) -> Call[v.SignalReceipt]:
    """`event`: a CloudEvent as structured JSON."""
    return Call("POST", path("events"), TypeAdapter(v.SignalReceipt), event, _CLOUDEVENT)


def events(**query: str | int | None) -> Call[v.Page[v.EventView]]:
    return _get(v.Page[v.EventView], "events", query=query)


def watch_events(kind: str = "", about: str = "") -> Call[v.EventView]:
    return _get(v.EventView, "events", "watch", query={"kind": kind, "about": about})


def parked(**query: str | int | None) -> Call[v.Page[v.ParkedView]]:
    return _get(v.Page[v.ParkedView], "parked", query=query)


def retry_parked(id: str) -> Call[v.ParkedView]:
    return _post(v.ParkedView, None, "parked", id, "retry")


def drop_parked(id: str) -> Call[v.ParkedView]:
    return Call("DELETE", path("parked", id), TypeAdapter(v.ParkedView))


def why(name: str, limit: int, number: int | None) -> Call[v.WhyView]:
    return _get(v.WhyView, "why", name, query={"limit": limit, "round": number})


def join_tokens(**query: str | int | None) -> Call[v.Page[v.JoinTokenView]]:
    return _get(v.Page[v.JoinTokenView], "join-tokens", query=query)


def create_join_token(asked: requests.TokenRequest) -> Call[v.NewJoinToken]:
    return _post(v.NewJoinToken, asked, "join-tokens")


def revoke_join_token(name: str) -> Call[v.JoinTokenView]:
    return Call("DELETE", path("join-tokens", name), TypeAdapter(v.JoinTokenView))


def login() -> Call[LoginView]:
    return _get(LoginView, "login")


def whoami() -> Call[PrincipalView]:
    return _get(PrincipalView, "whoami")


def service_tokens(**query: str | int | None) -> Call[v.Page[ServiceTokenView]]:
    return _get(v.Page[ServiceTokenView], "tokens", query=query)


def create_service_token(asked: ServiceTokenRequest) -> Call[NewServiceToken]:
    return _post(NewServiceToken, asked, "tokens")


def revoke_service_token(name: str) -> Call[ServiceTokenView]:
    return Call("DELETE", path("tokens", name), TypeAdapter(ServiceTokenView))


def audit(
    who: str = "", action: str = "", since: datetime | None = None, until: datetime | None = None, limit: int = 1000
) -> Call[v.Page[AuditEntry]]:
    query: Query = {"who": who, "action": action, "limit": limit, **_period(_utc(since), _utc(until))}
    return _get(v.Page[AuditEntry], "audit", query=query)


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at


def tenants(**query: str | int | None) -> Call[v.Page[TenantView]]:
    return _get(v.Page[TenantView], "tenants", query=query)


def tenant(name: str) -> Call[TenantView]:
    return _get(TenantView, "tenants", name)


def add_tenant(asked: TenantRequest) -> Call[NewTenant]:
    return _post(NewTenant, asked, "tenants")


def change_tenant(name: str, asked: TenantChange) -> Call[TenantView]:
    return _put(TenantView, asked, "tenants", name)


def set_quota(name: str, asked: QuotaChange) -> Call[TenantView]:
    return _put(TenantView, asked, "tenants", name, "quota")


def remove_tenant(name: str) -> Call[TenantView]:
    return Call("DELETE", path("tenants", name), TypeAdapter(TenantView))


def trust() -> Call[v.TrustView]:
    return _get(v.TrustView, "trust")


def publish_trust(metadata: TrustMetadata) -> Call[v.TrustView]:
    return Call(
        "PUT", path("trust"), TypeAdapter(v.TrustView), metadata.model_dump_json(exclude_defaults=True).encode()
    )


def attestation(model: str, version: str) -> Call[v.AttestationView]:
    return _get(v.AttestationView, "models", model, "versions", version, "attestation")


def attest(model: str, version: str, envelope: str) -> Call[v.AttestationView]:
    body = requests.AttestationRequest(envelope=envelope).model_dump_json().encode()
    where = path("models", model, "versions", version, "attestation")
    return Call("PUT", where, TypeAdapter(v.AttestationView), body)


def lineage(model: str, version: str) -> Call[v.LineageView]:
    return _get(v.LineageView, "models", model, "versions", version, "lineage")


def influence(node: str) -> Call[v.InfluenceView]:
    return _get(v.InfluenceView, "nodes", node, "influence")


def quarantine(node: str, reason: str, *, lift: bool = False) -> Call[v.InfluenceView]:
    return _post(v.InfluenceView, requests.QuarantineRequest(reason=reason, lift=lift), "nodes", node, "quarantine")


def revoke_node(name: str, reason: str) -> Call[v.Revoked]:
    return _post(v.Revoked, requests.RevokeRequest(reason=reason), "nodes", name, "revoke")


def rights() -> Call[v.Rights]:
    return Call("GET", path("identity", "rights"), TypeAdapter(v.Rights))


def remove_node(node: str) -> Call[v.Removed]:
    return Call("DELETE", path("nodes", node), TypeAdapter(v.Removed))


def regions(**query: str | int | None) -> Call[v.Page[v.RegionView]]:
    return _get(v.Page[v.RegionView], "regions", query=query)


def remove_region(region: str) -> Call[v.Removed]:
    return Call("DELETE", path("regions", region), TypeAdapter(v.Removed))


def region_credentials(region: str, hosts: list[str], *, rotates: bool = False) -> Call[v.RegionCredentials]:
    asked = requests.RegionRequest(hosts=hosts, rotates=rotates)
    return _post(v.RegionCredentials, asked, "regions", region, "credentials")


def _action(reason: str, region: str = "") -> requests.ActionRequest:
    return requests.ActionRequest(**({"reason": reason} if reason else {}), region=region)


_CLOUDEVENT = {"Content-Type": "application/cloudevents+json"}


def costs(
    by: str = "", since: datetime | None = None, until: datetime | None = None, where: str = ""
) -> Call[CostView]:
    return _get(CostView, "costs", query={"by": by, "where": where, **_period(since, until)})


def cost_lines(
    limit: int | None = None, since: datetime | None = None, until: datetime | None = None, where: str = ""
) -> Call[v.Page[CostLine]]:
    return _get(v.Page[CostLine], "costs", "lines", query={"limit": limit, "where": where, **_period(since, until)})


def _period(since: datetime | None, until: datetime | None) -> Query:
    return {name: at.isoformat() for name, at in (("since", since), ("until", until)) if at is not None}


def prices() -> Call[PriceBook]:
    return _get(PriceBook, "prices")


def apply_prices(book: PriceBook) -> Call[PriceBook]:
    return Call("PUT", path("prices"), TypeAdapter(PriceBook), book.model_dump_json(exclude_defaults=True).encode())


def budgets(**query: str | int | None) -> Call[v.Page[BudgetView]]:
    return _get(v.Page[BudgetView], "budgets", query=query)


def budget(name: str) -> Call[BudgetView]:
    return _get(BudgetView, "budgets", name)


def apply_budget(asked: Budget) -> Call[BudgetView]:
    data = asked.model_dump_json(exclude_defaults=True).encode()
    return Call("PUT", path("budgets", asked.name), TypeAdapter(BudgetView), data)


def remove_budget(name: str) -> Call[BudgetView]:
    return Call("DELETE", path("budgets", name), TypeAdapter(BudgetView))
