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
    NodeRemoved,
    NodeRevoked,
    RegionIssued,
    RegionRemoved,
)
from fedtide.fabric.nats.accounts import NODES, RUNS, region_account
from fedtide.fabric.nats.authority import ALL_ISSUED, RUN_LIFETIME_S, Void
from fedtide.fabric.nats.subjects import RESERVED

RENEWAL_PAUSE = timedelta(days=1)
"""A node that renews more often than that only fills the log."""
NEVER = datetime.max.replace(tzinfo=UTC)
MOST_NAMED = 5_000
"""So many keys an account of 100 regions can name as withdrawn: nats-server takes no JWT of more than 1 MiB."""
RUNS_NAMED = 1_000
"""Of more ended runs, the older ones are not named one by one."""
CLOCKS_DIFFER = timedelta(hours=1)
"""So much, at most, the clocks of two coordinators of one installation."""


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
    """`withdrawn`: keys that were revoked before their expiry, each with the time of both; `ended`: those of runs."""

    tokens: Mapping[str, Token] = field(default_factory=dict)
    nodes: Mapping[str, NodeIdentity] = field(default_factory=dict)
    regions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    regions_before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The keys before those of `regions`, which are still good."""
    region_ends: Mapping[str, datetime] = field(default_factory=dict)
    """When the credentials of `regions` expire."""
    withdrawn: Void = field(default_factory=dict)
    ended: Void = field(default_factory=dict)


def step(state: Identities, event: IdentityEvent, at: datetime) -> tuple[Identities, Commands]:
    """Raises InvalidTransition if a token does not allow what was asked with it."""
    match event:
        case JoinTokenCreated():
            return _token_created(state, event, at)
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
        case NodeRevoked():
            return _revoked(state, event, at)
        case NodeRemoved(node=name):
            return _removed(state, name, at)
        case RegionIssued():
            return _region_issued(state, event, at)
        case RegionRemoved(region=name):
            return _region_removed(state, name, at)


def _token_created(state: Identities, event: JoinTokenCreated, at: datetime) -> tuple[Identities, Commands]:
    if event.token in state.tokens:
        raise InvalidTransition(f"there is a token {event.token} already")
    alive = {name: token for name, token in state.tokens.items() if token.created.expires_at > at}
    return replace(state, tokens={**alive, event.token: Token(event, at)}), ()


def _revoked(state: Identities, event: NodeRevoked, at: datetime) -> tuple[Identities, Commands]:
    known = state.nodes.get(event.node)
    if known is None:
        raise InvalidTransition(f"node {event.node} has no credentials")
    nodes = {**state.nodes, event.node: replace(known, keys=(), revoked_at=at, reason=event.reason)}
    return _withdraw(replace(state, nodes=nodes), known.keys, at)


def _removed(state: Identities, node: str, at: datetime) -> tuple[Identities, Commands]:
    known = state.nodes.get(node)
    state = replace(state, nodes={name: each for name, each in state.nodes.items() if name != node})
    return _withdraw(state, known.keys if known is not None else (), at)


def _region_removed(state: Identities, region: str, at: datetime) -> tuple[Identities, Commands]:
    keys = [(key, NEVER) for kept in (state.regions, state.regions_before) for key in kept.get(region, ())]
    keys += [key for node in state.nodes.values() if node.region == region for key in node.keys]
    state = replace(
        state,
        nodes={name: node for name, node in state.nodes.items() if node.region != region},
        regions={name: kept for name, kept in state.regions.items() if name != region},
        regions_before={name: kept for name, kept in state.regions_before.items() if name != region},
        region_ends={name: ends for name, ends in state.region_ends.items() if name != region},
    )
    return _withdraw(state, keys, at)


def _region_issued(state: Identities, event: RegionIssued, at: datetime) -> tuple[Identities, Commands]:
    """Raises InvalidTransition: a region may not renew with the key it names, or not so soon."""
    last, before = state.regions.get(event.region, ()), state.regions_before.get(event.region, ())
    if event.renews:
        if event.renews not in (*last, *before):
            raise InvalidTransition(
                f"region {event.region} has no such credentials (any more)", f"fedtide fleet region {event.region}"
            )
        if tuple(event.keys) == last:
            return state, ()  # the answer was lost
        if any(_is_taken(state, key) for key in event.keys):
            raise InvalidTransition("a key belongs to another identity, or was withdrawn", "Make new ones")
        ends = state.region_ends.get(event.region)
        if before and ends and event.expires_at and event.expires_at - ends < RENEWAL_PAUSE:
            raise InvalidTransition(f"region {event.region} got credentials today", "They are good for a year")
        if event.renews in before:
            last, before = before, last  # it never got the others
    gone = [*before, *(last if event.rotates else ())]
    state = replace(
        state,
        regions={**state.regions, event.region: tuple(event.keys)},
        region_ends={**state.region_ends, **({event.region: event.expires_at} if event.expires_at else {})},
        regions_before={**state.regions_before, event.region: () if event.rotates else last},
    )
    return _withdraw(state, [(key, NEVER) for key in gone if key not in event.keys], at)


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
    if known is not None and known.region == event.region and _holds(known, event.key):
        return None  # the first answer was lost: the node asks again
    if _is_taken(state, event.key):
        return (
            "the key belongs to another identity, or was withdrawn",
            "The node makes a new one when it tries again",
        )
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
    """A new key beside the one with which it was asked for; all others are withdrawn.

    An answer may be lost: then the node goes on with the key that it has, and asks again for another.
    """
    known = state.nodes.get(event.node)
    if known is None and event.rejoins:
        known = NodeIdentity(event.node, event.region, ((event.renews, event.expires_at),))
    if known is None or known.revoked or known.region != event.region:
        raise InvalidTransition(f"node {event.node} has no credentials to renew", "Enrol it with a join token")
    if event.rejoins and event.renews in (*state.withdrawn, *state.ended):
        raise InvalidTransition(f"the credentials of node {event.node} were withdrawn", "Enrol it with a join token")
    if _holds(known, event.key):
        return state, ()
    if _is_taken(state, event.key):
        raise InvalidTransition("the key belongs to another identity, or was withdrawn", "Make a new one")
    alive = _alive(known.keys, at)
    in_use = tuple(each for each in alive if each[0] == event.renews) or alive[-1:]
    newest = max((ends for _, ends in alive), default=at)
    if len(alive) > 1 and event.expires_at - newest < RENEWAL_PAUSE and not event.rejoins:
        raise InvalidTransition(f"node {event.node} has renewed its credentials today", "They are good for months")
    keys = (*in_use, (event.key, event.expires_at))
    state = replace(state, nodes={**state.nodes, event.node: replace(known, keys=keys)})
    return _withdraw(state, [each for each in alive if each not in in_use], at)


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
    return (PublishAccount(),) if state.withdrawn or state.ended else ()


def is_revoked(state: Identities, node: str) -> bool:
    known = state.nodes.get(node)
    return known is not None and known.revoked


def run_ended(state: Identities, key: str, at: datetime) -> tuple[Identities, Commands]:
    """The key of a run's aggregators is void."""
    kept = {k: when for k, when in state.ended.items() if when[1] > at}
    ended = {**kept, key: (at, at + timedelta(seconds=RUN_LIFETIME_S))}
    return replace(state, ended=ended), (PublishAccount(),)


def void_in(state: Identities, account: str) -> Void:
    """The keys that are void in an account. Each account has its own: to change one disturbs all who are in it."""
    if account == RUNS:
        return state.ended
    if account == NODES:
        newest = sorted(state.withdrawn.items(), key=lambda item: item[1][0])[-MOST_NAMED:]
        return dict(newest)
    of_a_region = account.startswith(region_account(""))
    return {key: when for key, when in state.withdrawn.items() if when[1] == NEVER} if of_a_region else {}


def in_fewer(ended: Void, active_since: datetime) -> Void:
    """The same keys of runs, but if they are many, those from before the oldest active run under a date.

    Args:
        active_since: all credentials that may be in use were issued later.
    """
    if len(ended) <= RUNS_NAMED:
        return ended
    before = active_since - CLOCKS_DIFFER
    named = [(key, when) for key, when in ended.items() if when[0] > before - CLOCKS_DIFFER]
    return {ALL_ISSUED: (before, before), **dict(named[-MOST_NAMED:])}


def warnings(state: Identities) -> list[str]:
    """What a person should know of the withdrawn keys."""
    unnamed = len(state.withdrawn) - MOST_NAMED
    if unnamed <= 0:
        return []
    return [
        f"{unnamed} withdrawn keys are more than servers can be told of: the oldest may connect until they expire, "
        "and nobody believes them; make a new authority (docs/upgrading.md) to shut them out"
    ]


def _is_taken(state: Identities, key: str) -> bool:
    """Whether a key is, or was, that of anybody."""
    of_others = (
        *state.withdrawn,
        *state.ended,
        *(token.created.key for token in state.tokens.values()),
        *(k for keys in (*state.regions.values(), *state.regions_before.values()) for k in keys),
        *(k for node in state.nodes.values() for k, _ in node.keys),
    )
    return key in of_others


def why_no_member(state: Identities, region: str, node: str) -> str | None:
    """Why a node is not believed when it speaks as one of a region; None if it is."""
    known = state.nodes.get(node)
    if known is None:
        return f"there is no identity of a node {node!r}"
    if known.region != region:
        return f"node {node!r} is of region {known.region!r}, not {region!r}"
    return "its credentials were revoked" if known.revoked else None


def _holds(known: NodeIdentity, key: str) -> bool:
    return any(k == key for k, _ in known.keys)


def _alive(keys: tuple[tuple[str, datetime], ...], at: datetime) -> tuple[tuple[str, datetime], ...]:
    return tuple((key, ends) for key, ends in keys if ends > at)
