"""Tenants: what each may use, and what is said of them. Pure data."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedtide.fabric.ids import is_token
from fedtide.fabric.plans.prices import Money
from fedtide.fabric.strict import Request, Strict

TENANT_NAME = r"^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$"
"""Short, and in lower case: it stands in names of Kubernetes' objects beside those of release and run."""
MOST_TENANTS = 100
DEFAULT_BYTES = 10**9

Files = dict[str, str]


def _are_names(regions: list[str]) -> list[str]:
    if len(set(regions)) != len(regions) or not all(map(is_token, regions)):
        raise ValueError("must be names of regions, each once: letters, digits, '-' and '_'")
    return regions


Regions = Annotated[list[str], Field(min_length=1, max_length=20), AfterValidator(_are_names)]


class Quota(Request):
    """What a tenant may use; None: as much as there is."""

    nodes: int | None = Field(default=None, ge=0, description="That have credentials")
    runs: int | None = Field(default=None, ge=0, description="At the same time")
    bytes: int | None = Field(default=DEFAULT_BYTES, ge=10**8, description="That the hub stores, replicas counted")
    money: Money | None = Field(default=None, gt=0, description="In a month, by the installation's prices")


class QuotaChange(Request):
    """What is left out stays; see `unlimited` for what is to have no limit any more."""

    nodes: int | None = Field(default=None, ge=0)
    runs: int | None = Field(default=None, ge=0)
    bytes: int | None = Field(default=None, ge=10**8)
    money: Money | None = Field(default=None, gt=0)
    unlimited: list[Literal["nodes", "runs", "money"]] = []

    def applied_to(self, before: Quota) -> Quota:
        named = self.model_dump(include=set(Quota.model_fields), exclude_none=True)
        return Quota.model_validate({**before.model_dump(), **dict.fromkeys(self.unlimited), **named})


class TenantRequest(Request):
    """A new tenant. `files`: what its director needs, as `fedtide trust init` writes it, by file name."""

    name: str = Field(pattern=TENANT_NAME)
    regions: Regions
    quota: Quota = Quota()
    files: Files
    namespace: str = Field(default="", pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$", description="Of its Jobs")
    releases_signed_by: Literal["authority", "people"] = "authority"


class TenantChange(Request):
    """What is left out stays as it is."""

    regions: Regions | None = None
    files: Files | None = Field(default=None, description="Of the director: these go over those that it has")


class NewTenant(Strict):
    """Shown once.

    Args:
        token: of the tenant's first admin.
        signer: credentials (`.creds`) of its release authority.
        hub_url: where that connects to, as the coordinator does.
    """

    name: str
    token: str
    signer: str
    hub_url: str


class TenantUse(Strict):
    """How much of its quota a tenant uses."""

    nodes: int = 0
    runs: int = 0
    bytes: int = 0
    money: Decimal = Decimal(0)


class TenantView(Strict):
    """`state`: `served`, or why it is not at the moment."""

    name: str
    state: str
    regions: list[str]
    quota: Quota
    used: TenantUse
    currency: str
    added: datetime
    by: str
