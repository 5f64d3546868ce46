"""The tenants that an installation serves beside its own. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from fedtide.fabric.errors import InvalidTransition, NotFound
from fedtide.fabric.events.tenants import TenantAdded, TenantChanged, TenantEvent, TenantForgotten, TenantRemoved
from fedtide.fabric.messages.tenants import MOST_TENANTS, Quota


@dataclass(frozen=True, slots=True)
class Tenant:
    """As it was added, and what was changed since."""

    added: TenantAdded
    at: datetime
    regions: tuple[str, ...]
    quota: Quota
    sealed: str
    is_leaving: bool = False

    @property
    def name(self) -> str:
        return self.added.tenant

    def as_added_now(self) -> TenantAdded:
        """What would add it as it is."""
        now = {"regions": list(self.regions), "quota": self.quota, "sealed": self.sealed}
        return self.added.model_copy(update=now)


def of_added(event: TenantAdded, at: datetime) -> Tenant:
    return Tenant(event, at, tuple(event.regions), event.quota, event.sealed)


def step(state: dict[str, Tenant], event: TenantEvent, at: datetime) -> dict[str, Tenant]:
    """Raises InvalidTransition, NotFound."""
    match event:
        case TenantAdded(tenant=name):
            if name in state:
                raise InvalidTransition(f"there is a tenant {name!r} already", "See `fedtide tenant ls`")
            if len(state) >= MOST_TENANTS:
                raise InvalidTransition(f"there are {MOST_TENANTS} tenants already", "Make another installation")
            return {**state, name: of_added(event, at)}
        case TenantChanged(tenant=name):
            known = found(state, name)
            if known.is_leaving:
                raise InvalidTransition(f"tenant {name!r} is being removed")
            changed = replace(
                known,
                regions=known.regions if event.regions is None else tuple(event.regions),
                quota=known.quota if event.quota is None else event.quota,
                sealed=known.sealed if event.sealed is None else event.sealed,
            )
            return {**state, name: changed}
        case TenantRemoved(tenant=name):
            return {**state, name: replace(found(state, name), is_leaving=True)}
        case TenantForgotten(nonce=nonce):
            return {key: each for key, each in state.items() if each.added.nonce != nonce}


def found(state: Mapping[str, Tenant], name: str) -> Tenant:
    """Raises NotFound."""
    if name not in state:
        raise NotFound(f"there is no tenant {name!r}", f"Known: {', '.join(sorted(state)) or 'none yet'}")
    return state[name]


def why_no_run(quota: Quota, active: int) -> tuple[str, str] | None:
    """Why no further run may begin, and what to do; None: one may."""
    if quota.runs is None or active < quota.runs:
        return None
    return f"the quota of {quota.runs} runs at a time is used up", "Wait for one, or cancel it"


def why_no_node(quota: Quota, others: int) -> tuple[str, str] | None:
    """The same, of a further node."""
    if quota.nodes is None or others < quota.nodes:
        return None
    return f"the quota of {quota.nodes} nodes is used up", "Remove a node: fedtide fleet rm NODE"
