"""Join tokens, the keys of nodes and regions, and which keys are withdrawn. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from fedtide.coordinator.commands import Commands, PublishAccount
from fedtide.fabric.errors import InvalidTransition
from fedtide.fabric.events.identity import (
    IdentityEvent,
    JoinTokenCreated,
    JoinTokenRevoked,
    NodeEnrolled,
    NodeRevoked,
    RegionIssued,
)
from fedtide.fabric.nats.authority import RUN_LIFETIME_S
from fedtide.fabric.nats.subjects import RESERVED

NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Token:
    created: JoinTokenCreated
    at: datetime
    used: int = 0
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """`keys`: those that may still connect, oldest first, each with its expiry."""

    node: str
    region: str
    keys: tuple[tuple[str, datetime], ...] = ()
    revoked_at: datetime | None = None
    reason: str = ""

    @property
    def revoked(self) -> bool:
        return self.revoked_at is not None


@dataclass(frozen=True, slots=True)
class Identities:
    """`withdrawn`: keys that were revoked before their expiry, each with the time of both."""

    tokens: Mapping[str, Token] = field(default_factory=dict)
    nodes: Mapping[str, NodeIdentity] = field(default_factory=dict)
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    withdrawn: Mapping[str, tuple[datetime, datetime]] = field(default_factory=dict)


def step(state: Identities, event: IdentityEvent, at: datetime) -> tuple[Identities, Commands]:
    """Raises InvalidTransition if a token does not allow what was asked with it."""
    match event:
        case JoinTokenCreated(token=name):
            if name in state.tokens:
                raise InvalidTransition(f"there is a token {name} already")
            alive = {n: t for n, t in state.tokens.items() if t.created.expires_at > at}
            return replace(state, tokens={**alive, name: Token(event, at)}), ()
        case JoinTokenRevoked(token=name):
            token = state.tokens.get(name)
            if token is None:
                raise InvalidTransition(f"there is no token {name} (any more)")
            tokens = {**state.tokens, name: replace(token, revoked=True)}
            return _withdraw(replace(state, tokens=tokens), [(token.created.key, token.created.expires_at)], at)
        case NodeEnrolled(token=""):
            return _renewed(state, event, at)
        case NodeEnrolled():
            return _enrolled(state, event, at)
        case NodeRevoked(node=name, reason=reason):
            known = state.nodes.get(name)
            if known is None:
                raise InvalidTransition(f"node {name} has no credentials")
            nodes = {**state.nodes, name: replace(known, keys=(), revoked_at=at, reason=reason)}
            return _withdraw(replace(state, nodes=nodes), known.keys, at)
        case RegionIssued(region=region, keys=keys):
            old = state.regions.get(region, ())
            regions = {**state.regions, region: tuple(keys)}
            return _withdraw(replace(state, regions=regions), [(k, NEVER) for k in old if k not in keys], at)


def why_not(state: Identities, event: NodeEnrolled, at: datetime) -> tuple[str, str] | None:
    """Why a token does not give these credentials, and what to do; None if it does."""
    token, known = state.tokens.get(event.token), state.nodes.get(event.node)
    ask = "Ask for a new one: fedtide fleet token create"
    if token is None or token.created.expires_at <= at:
        return "the join token has expired", ask
    if token.revoked:
        return "the join token was revoked", ask
    if token.created.region not in ("", event.region):
        return f"the join token is for region {token.created.region!r}, not {event.region!r}", ask
    if known is not None and _holds(known, event.key):
        return None  # the first answer was lost: the node asks again
    if event.node in RESERVED:
        return f"the node name {event.node!r} is taken", "Give the node another name"
    if known is not None and known.revoked_at is not None and token.at <= known.revoked_at:
        return f"node {event.node!r} was revoked after this token was made", ask
    if token.used >= token.created.uses:
        return f"all {token.created.uses} uses of the join token are spent", ask
    if known is not None and not known.revoked and _alive(known.keys, at) and not token.created.replaces:
        return (
            f"node {event.node!r} has credentials already",
            f"Give the node another name, or allow it: fedtide fleet revoke {event.node}, or token create --replace",
        )
    return None


def _enrolled(state: Identities, event: NodeEnrolled, at: datetime) -> tuple[Identities, Commands]:
    reason = why_not(state, event, at)
    if reason is not None:
        raise InvalidTransition(*reason)
    known = state.nodes.get(event.node)
    if known is not None and _holds(known, event.key):
        return state, ()
    token = state.tokens[event.token]
    state = replace(
        state,
        tokens={**state.tokens, event.token: replace(token, used=token.used + 1)},
        nodes={**state.nodes, event.node: NodeIdentity(event.node, event.region, ((event.key, event.expires_at),))},
    )
    return _withdraw(state, known.keys if known is not None else (), at)


def _renewed(state: Identities, event: NodeEnrolled, at: datetime) -> tuple[Identities, Commands]:
    """A new key beside the one in use; the one before that is withdrawn."""
    known = state.nodes.get(event.node)
    if known is None or known.revoked or known.region != event.region:
        raise InvalidTransition(f"node {event.node} has no credentials to renew", "Enrol it with a join token")
    if _holds(known, event.key):
        return state, ()
    alive = _alive(known.keys, at)
    keys = (*alive[-1:], (event.key, event.expires_at))
    state = replace(state, nodes={**state.nodes, event.node: replace(known, keys=keys)})
    return _withdraw(state, alive[:-1], at)


def _withdraw(
    state: Identities, keys: list[tuple[str, datetime]] | tuple[tuple[str, datetime], ...], at: datetime
) -> tuple[Identities, Commands]:
    gone = {key: (at, ends) for key, ends in keys if ends > at}
    if not gone:
        return state, ()
    kept = {key: when for key, when in state.withdrawn.items() if when[1] > at}
    return replace(state, withdrawn={**kept, **gone}), (PublishAccount(),)


def pending_commands(state: Identities) -> Commands:
    """What this state still wants done: issued again after a restart."""
    return (PublishAccount(),) if state.withdrawn else ()


def is_revoked(state: Identities, node: str) -> bool:
    known = state.nodes.get(node)
    return known is not None and known.revoked


def run_ended(state: Identities, key: str, at: datetime) -> tuple[Identities, Commands]:
    """The key of a run's aggregators is void."""
    return _withdraw(state, [(key, at + timedelta(seconds=RUN_LIFETIME_S))], at)


def _holds(known: NodeIdentity, key: str) -> bool:
    return any(k == key for k, _ in known.keys)


def _alive(keys: tuple[tuple[str, datetime], ...], at: datetime) -> tuple[tuple[str, datetime], ...]:
    return tuple((key, ends) for key, ends in keys if ends > at)
