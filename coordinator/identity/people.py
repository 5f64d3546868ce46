"""Tokens of programs: what each may do, and until when. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.people import PeopleEvent, ServiceTokenCreated, ServiceTokenRevoked
from fedtide.fabric.messages.people import ServiceTokenView

FORGOTTEN_AFTER = timedelta(days=30)
"""So long a token is still shown after its end."""


@dataclass(frozen=True, slots=True)
class ServiceToken:
    created: ServiceTokenCreated
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class People:
    tokens: Mapping[str, ServiceToken] = field(default_factory=dict)


def step(state: People, event: PeopleEvent, at: datetime) -> People:
    """Raises InvalidTransition: there is no such token, or there is one of that id already."""
    known = {key: each for key, each in state.tokens.items() if each.created.expires_at > at - FORGOTTEN_AFTER}
    match event:
        case ServiceTokenCreated(id=key):
            if key in known:
                raise InvalidTransition(f"there is a token {key} already")
            return replace(state, tokens={**known, key: ServiceToken(event)})
        case ServiceTokenRevoked(id=key):
            if key not in known:
                raise InvalidTransition(f"there is no token {key} (any more)")
            return replace(state, tokens={**known, key: replace(known[key], revoked=True)})


def is_good(token: ServiceToken, at: datetime) -> bool:
    return not token.revoked and at < token.created.expires_at


def view(token: ServiceToken, at: datetime) -> ServiceTokenView:
    created = token.created
    return ServiceTokenView(
        id=created.id,
        name=created.name,
        role=created.role,
        state="revoked" if token.revoked else "good" if is_good(token, at) else "expired",
        expires=created.expires_at,
        by=created.by,
    )
