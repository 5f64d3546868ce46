"""Tenants that an installation serves beside its own. Pure data.

`sealed` is what only coordinators can read: the tenant's own keys, by the names of their files.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtide.fabric.messages.tenants import TENANT_NAME, Quota
from fedtide.fabric.strict import TaggedMessage


class TenantAdded(TaggedMessage):
    """In the installation's log. `nonce`: a later tenant of this name has other accounts and keys."""

    kind: Literal["tenant.added"] = "tenant.added"
    tenant: str = Field(pattern=TENANT_NAME)
    nonce: str
    regions: list[str]
    quota: Quota
    sealed: str
    namespace: str = ""
    releases_signed_by: Literal["authority", "people"] = "authority"
    by: str = ""


class TenantChanged(TaggedMessage):
    """What is None stays."""

    kind: Literal["tenant.changed"] = "tenant.changed"
    tenant: str
    regions: list[str] | None = None
    quota: Quota | None = None
    sealed: str | None = None
    by: str = ""


class TenantRemoved(TaggedMessage):
    """Nobody of it is let in from here on; its data are deleted next."""

    kind: Literal["tenant.removed"] = "tenant.removed"
    tenant: str
    by: str = ""


class TenantForgotten(TaggedMessage):
    """Nothing of it is stored any more."""

    kind: Literal["tenant.forgotten"] = "tenant.forgotten"
    tenant: str
    nonce: str


class QuotaSet(TaggedMessage):
    """In the tenant's own log: what the installation lets it use."""

    kind: Literal["quota.set"] = "quota.set"
    quota: Quota


TenantEvent = TenantAdded | TenantChanged | TenantRemoved | TenantForgotten
