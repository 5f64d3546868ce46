"""Makes metadata: what is done with offline keys, and the timestamps that an online key makes every day. Pure.

Every function returns the metadata's JSON. What is not signed by enough keys yet can be signed by others later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import quote

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.ids import check_token
from fedtide.fabric.trust.chain import ISSUED
from fedtide.fabric.trust.libraries import JSONSerializer, Key, Signer, exceptions, metadata

ROOT_DAYS, TARGETS_DAYS = 3 * 365, 365
TIMESTAMP_DAYS = 7
"""So long a region may be cut off before its nodes follow no new order."""
DIRECTOR, RELEASES, PUBLISHER = "director", "releases", "publisher-"
S = TypeVar("S", metadata.Root, metadata.Targets)
ONLINE = ("timestamp", "snapshot")
_COMPACT = JSONSerializer(compact=True)


@dataclass(frozen=True, slots=True)
class Role:
    """Keys to whom something is delegated, how many of them must sign, and what: paths (chain.py)."""

    keys: Sequence[Key]
    paths: Sequence[str]
    threshold: int = 1


@dataclass(frozen=True, slots=True)
class Offline:
    """Public keys of root and targets, and how many must sign."""

    keys: Sequence[Key]
    threshold: int = 1
    timestamp: Sequence[Key] = field(default_factory=tuple)
    """The online keys that vouch every day."""


def director_paths(region: str = "*") -> list[str]:
    return [f"orders/{region}/*"]


def publisher_paths(apps: Iterable[str] = ("*",)) -> list[str]:
    return [f"apps/{quote(each, safe='*?')}" for each in apps]  # as `chain.app_path` spells names


def release_paths(models: Iterable[str] = ("*",)) -> list[str]:
    return [f"releases/{each}/*" for each in models]


def role_of(name: str, keys: Sequence[Key], scope: Sequence[str] = (), threshold: int = 1) -> Role:
    """A role by its name: `director`, `director-REGION`, `publisher-NAME`, `releases`, `releases-NAME`.

    Args:
        scope: apps of a publisher, or models of a release authority; none: all.

    Raises:
        ConfigError: there is no such kind of role.
    """
    kind, _, rest = name.partition("-")
    if rest:
        check_token("role", rest)
    if kind == DIRECTOR:
        return Role(keys, director_paths(rest or "*"), threshold)
    if kind == PUBLISHER[:-1] and rest:
        return Role(keys, publisher_paths(scope or ["*"]), threshold)
    if kind == RELEASES:
        return Role(keys, release_paths(scope or ["*"]), threshold)
    raise ConfigError("role", f"{name!r} is no role", "director, director-REGION, publisher-NAME, releases-NAME")


def new_root(of: Offline, signers: Iterable[Signer], now: datetime, days: float = ROOT_DAYS) -> str:
    """The first root.

    Raises:
        ConfigError: more must sign than there are.
    """
    made = metadata.Root(version=1, expires=_after(now, days), consistent_snapshot=False)
    _set_keys(made, of)
    return _sealed(metadata.Metadata(made), signers)


def next_root(before: str, of: Offline, signers: Iterable[Signer], now: datetime, days: float = ROOT_DAYS) -> str:
    """The root after another; the keys of both must sign it."""
    known = read_root(before)
    made = metadata.Root(version=known.version + 1, expires=_after(now, days), consistent_snapshot=False)
    _set_keys(made, of)
    return _sealed(metadata.Metadata(made), signers)


def _set_keys(root: metadata.Root, of: Offline) -> None:
    if not 1 <= of.threshold <= len({key.keyid for key in of.keys}):
        raise ConfigError("threshold", f"is {of.threshold}, and there are {len(of.keys)} keys")
    for role, keys, threshold in (
        *((name, of.keys, of.threshold) for name in ("root", "targets")),
        *((name, of.timestamp, 1) for name in ONLINE),
    ):
        for key in keys:
            root.add_key(key, role)
        root.roles[role].threshold = threshold


def targets(
    roles: Mapping[str, Role], signers: Iterable[Signer], now: datetime, version: int = 1, days: float = TARGETS_DAYS
) -> str:
    """What is delegated to whom."""
    delegations = metadata.Delegations(keys={}, roles={})
    made = metadata.Targets(version=version, expires=_after(now, days), delegations=delegations)
    for name, role in roles.items():
        if not 1 <= role.threshold <= len(role.keys):
            raise ConfigError(name, f"{role.threshold} of {len(role.keys)} keys must sign")
        assert delegations.roles is not None
        delegations.roles[name] = metadata.DelegatedRole(
            name, [], role.threshold, terminating=False, paths=list(role.paths)
        )
        for key in role.keys:
            made.add_key(key, name)
    return _sealed(metadata.Metadata(made), signers)


def roles_in(text: str) -> dict[str, Role]:
    """What metadata of that kind delegate."""
    found = read_targets(text)
    if found.delegations is None or found.delegations.roles is None:
        return {}
    keys = found.delegations.keys
    return {
        name: Role([keys[k] for k in role.keyids if k in keys], list(role.paths or ()), role.threshold)
        for name, role in found.delegations.roles.items()
    }


def vouched(targets_version: int, version: int, signer: Signer, now: datetime) -> tuple[str, str]:
    """Timestamp and snapshot: these are the metadata now."""
    ends = _after(now, TIMESTAMP_DAYS)
    about = {"targets.json": metadata.MetaFile(targets_version)}
    snapshot = metadata.Snapshot(version=version, expires=ends, meta=about)
    timestamp = metadata.Timestamp(
        version=version,
        expires=ends,
        snapshot_meta=metadata.MetaFile(version),
        unrecognized_fields={ISSUED: int(now.timestamp())},
    )
    return _sealed(metadata.Metadata(timestamp), [signer]), _sealed(metadata.Metadata(snapshot), [signer])


def signed_too(text: str, signers: Iterable[Signer]) -> str:
    """Metadata with the signatures of more keys."""
    return _sealed(_parsed(text), signers)


def missing_signatures(text: str, root: str, before: str = "") -> int:
    """How many more keys must sign metadata. `root`: who says so; `before`: of a root, the one that it follows."""
    found, by = _parsed(text), read_root(root)
    left = [by.get_verification_result(found.signed.type, found.signed_bytes, found.signatures).missing]
    if before:
        known = read_root(before)
        left.append(known.get_verification_result("root", found.signed_bytes, found.signatures).missing)
    return max(left)


def read_root(text: str) -> metadata.Root:
    """Raises ConfigError."""
    return _of_kind(text, metadata.Root)


def read_targets(text: str) -> metadata.Targets:
    """Raises ConfigError."""
    return _of_kind(text, metadata.Targets)


def offline_in(root: str) -> Offline:
    """Whose keys a root names."""
    found = read_root(root)
    named: Callable[[str], list[Key]] = lambda role: [found.keys[k] for k in found.roles[role].keyids]  # noqa: E731
    return Offline(named("root"), found.roles["root"].threshold, named("timestamp"))


def _of_kind(text: str, kind: type[S]) -> S:
    found = _parsed(text).signed
    if not isinstance(found, kind):
        raise ConfigError("metadata", f"are of type {found.type}, not {kind.type}")
    return found


def _parsed(text: str) -> metadata.Metadata[Any]:
    try:
        return metadata.Metadata.from_bytes(text.encode())
    except (exceptions.RepositoryError, ValueError) as exc:
        raise ConfigError("metadata", f"are no TUF metadata: {exc}") from exc


def _sealed(made: metadata.Metadata[Any], signers: Iterable[Signer]) -> str:
    for signer in signers:
        try:
            made.sign(signer, append=True)
        except exceptions.UnsignedMetadataError as exc:  # the library hides what a token has said
            raise exc.__cause__ or exc from None
    return made.to_bytes(_COMPACT).decode()


def _after(now: datetime, days: float) -> datetime:
    return (now.astimezone(UTC) + timedelta(days=days)).replace(microsecond=0)
