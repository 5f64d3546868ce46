"""What a root's metadata delegate, and whether somebody may say something. Pure: the time is an argument.

    root (offline, m of n)
      timestamp, snapshot     online: the metadata are still these
      targets (offline)       who may do what, by the path of what is signed:
        director...           orders/REGION/NODE: desired states, tasks, questions; a mandate for one run's aggregator
        publisher-NAME        apps/APP: app bundles with their wheels
        releases...           releases/MODEL/VERSION: release manifests, by their provenance

TUF has the metadata of its target files signed by the roles; here the roles sign what they say itself: an order is no
file, and there is one for every node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import quote

from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata
from fedtide.fabric.trust.libraries import EnvelopeType, Signature, TrustedMetadataSet, exceptions, metadata
from fedtide.fabric.trust.refusals import Untrusted

S = TypeVar("S", bound=metadata.Signed)

ISSUED = "x-fedtide-issued"
"""A field of the timestamp: when it was signed, in seconds since the epoch."""
LATEST = 1e11
"""Seconds since the epoch: no date that anybody means is later."""
_UNREADABLE = (
    exceptions.RepositoryError,
    *(ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError),
)
"""What comes of JSON that the library does not foresee."""
_BEFORE_ALL = datetime.fromtimestamp(0, UTC)
MOST_ROOTS = 1000
Signatures = Mapping[str, str]
"""Hexadecimal, by the id of the key."""


def order_path(region: str, node: str) -> str:
    return f"orders/{region}/{node}"


def app_path(name: str) -> str:
    """An app may have any name."""
    return f"apps/{quote(name, safe='')}"


def release_path(model: str, version: int) -> str:
    return f"releases/{model}/{version}"


@dataclass(frozen=True, slots=True)
class Files:
    """Verified metadata, each file as its JSON; empty: none yet."""

    root: str
    timestamp: str = ""
    snapshot: str = ""
    targets: str = ""


class Chain:
    """The metadata of one root, as far as they are verified."""

    def __init__(self, files: Files) -> None:
        """Raises Untrusted: the root is not signed by itself."""
        try:
            self.root = _signed(files.root, metadata.Root)
            own = metadata.Metadata[metadata.Root].from_bytes(files.root.encode())
            own.verify_delegate(metadata.Root.type, own)
            self.timestamp = _signed(files.timestamp, metadata.Timestamp) if files.timestamp else None
            self.targets = _signed(files.targets, metadata.Targets) if files.targets else None
        except _UNREADABLE as exc:
            raise Untrusted("arbitrary", f"these are no metadata: {exc}") from exc
        self.files = files

    @property
    def known(self) -> TrustKnown:
        return TrustKnown(root=self.root.version, timestamp=self.timestamp.version if self.timestamp else 0)

    @property
    def issued(self) -> float:
        """When the timestamp was signed; 0: there is none."""
        found = self.timestamp.unrecognized_fields.get(ISSUED, 0) if self.timestamp is not None else 0
        return float(found) if isinstance(found, int | float) and 0 <= found < LATEST else 0.0

    @property
    def vouchers(self) -> frozenset[str]:
        """The keys that say that the metadata are still these, and what time it is."""
        return _vouchers(self.root)

    @property
    def horizon(self) -> float:
        """Until when nothing that is kept offline has expired; seconds since the epoch."""
        ends = [self.root.expires, *([self.targets.expires] if self.targets is not None else [])]
        return min(end.timestamp() for end in ends)

    def updated(self, offered: TrustMetadata, now: float) -> tuple[Chain, Untrusted | None]:
        """The chain with what is newer of the metadata that are offered, as far as they hold; and why not further.

        The client workflow of the TUF specification, section 5.3 to 5.6.
        """
        try:
            return self._updated(offered, now)
        except _UNREADABLE as exc:
            return self, Untrusted("arbitrary", f"the metadata do not parse: {exc}")

    def _updated(self, offered: TrustMetadata, now: float) -> tuple[Chain, Untrusted | None]:
        files = self.files
        trusted = TrustedMetadataSet(files.root.encode(), EnvelopeType.METADATA)
        trusted.reference_time = datetime.fromtimestamp(now, UTC)
        try:
            for root in offered.roots[:MOST_ROOTS]:
                if _signed(root, metadata.Root).version > trusted.root.version:
                    trusted.update_root(root.encode())
                    files = replace(files, root=root)
            if _vouchers(trusted.root) != self.vouchers:
                trusted.reference_time = _BEFORE_ALL  # the time that is known was told by those who count no more
            _kept(lambda: trusted.update_timestamp(files.timestamp.encode()) if files.timestamp else None)
            if offered.timestamp:
                files = replace(files, timestamp=_newer_timestamp(trusted, offered.timestamp, files.timestamp))
            _kept(lambda: trusted.update_snapshot(files.snapshot.encode(), trusted=True) if files.snapshot else None)
            if offered.snapshot:
                trusted.update_snapshot(offered.snapshot.encode())
                files = replace(files, snapshot=offered.snapshot)
            _kept(lambda: trusted.update_targets(files.targets.encode()) if files.targets else None)
            if offered.targets:
                trusted.update_targets(offered.targets.encode())
                files = replace(files, targets=offered.targets)
        except exceptions.RepositoryError as exc:
            return Chain(_without_foreign(files)), _refusal(exc)
        return Chain(files), None

    def roles_for(self, path: str, payload: bytes, signatures: Signatures, now: float) -> frozenset[str]:
        """The delegated roles that vouch for `payload` as `path`, with as many signatures as each needs.

        Args:
            now: the time by which metadata expire, seconds since the epoch.

        Raises:
            Untrusted: none does.
        """
        targets = self._current(now)
        assert targets.delegations is not None and targets.delegations.roles is not None
        given = {keyid: Signature(keyid, sig) for keyid, sig in signatures.items()}
        roles = targets.delegations.roles.values()
        fitting = [role for role in roles if role.is_delegated_path(path)]
        found = frozenset(r.name for r in fitting if _verified(targets, r.name, payload, given))
        if found:
            return found
        if not given:
            raise Untrusted("arbitrary", f"{path} is not signed")
        known = {keyid for role in roles for keyid in role.keyids}
        if not known.intersection(given):
            raise Untrusted("unknown_signer", f"{path} is signed by {_short(given)}, to whom nothing is delegated")
        if not {keyid for role in fitting for keyid in role.keyids}.intersection(given):
            raise Untrusted("wrong_target", f"{path} is signed by {_short(given)}, to whom that is not delegated")
        raise Untrusted("arbitrary", f"{path} does not have the signatures that it needs")

    def check_current(self, now: float) -> None:
        """Raises Untrusted: the metadata do not hold any more."""
        self._current(now)

    def _current(self, now: float) -> metadata.Targets:
        """Raises Untrusted: there are no metadata that hold now."""
        targets, timestamp = self.targets, self.timestamp
        if targets is None or timestamp is None or targets.delegations is None:
            raise Untrusted("freeze", "there are no metadata yet that say who may do what")
        at = datetime.fromtimestamp(now, UTC)
        for file, remedy in ((self.root, "fedtide trust refresh"), (targets, "fedtide trust refresh")):
            if file.is_expired(at):
                raise Untrusted("expired", f"the metadata {file.type} expired on {file.expires:%Y-%m-%d}", remedy)
        if timestamp.is_expired(at):
            raise Untrusted("freeze", f"nobody has vouched for the metadata since {timestamp.expires:%Y-%m-%d}")
        return targets


def _vouchers(root: metadata.Root) -> frozenset[str]:
    return frozenset(root.roles[metadata.Timestamp.type].keyids)


def _signed(text: str, kind: type[S]) -> S:
    found = metadata.Metadata.from_bytes(text.encode()).signed
    if not isinstance(found, kind):
        raise ValueError(f"it is of type {found.type}, not {kind.type}")
    return found


def _kept(load: Callable[[], object]) -> None:
    """Load what is on the disk: what has expired or was signed by replaced keys counts no more, and no less."""
    with suppress(exceptions.RepositoryError, RuntimeError):
        load()


def _newer_timestamp(trusted: TrustedMetadataSet, offered: str, kept: str) -> str:
    try:
        trusted.update_timestamp(offered.encode())
    except exceptions.EqualVersionNumberError:
        return kept
    return offered


def _without_foreign(files: Files) -> Files:
    """After a new root: what other keys have signed is void, also as a counter (specification, 5.3.11)."""
    root = metadata.Metadata[metadata.Root].from_bytes(files.root.encode())
    for name, text in (("timestamp", files.timestamp), ("snapshot", files.snapshot), ("targets", files.targets)):
        if text:
            try:
                root.verify_delegate(name, metadata.Metadata.from_bytes(text.encode()))
            except exceptions.RepositoryError:
                files = replace(files, **{name: ""})
    return files


def _verified(targets: metadata.Targets, role: str, payload: bytes, given: dict[str, Signature]) -> bool:
    try:
        return bool(targets.get_verification_result(role, payload, given))
    except ValueError:  # a signature that is no hexadecimal number
        return False


def _short(signatures: Mapping[str, object]) -> str:
    return ", ".join(keyid[:12] for keyid in signatures)


def _refusal(exc: exceptions.RepositoryError) -> Untrusted:
    match exc:
        case exceptions.BadVersionNumberError():
            return Untrusted("rollback", f"the metadata are older than what is known: {exc}")
        case exceptions.ExpiredMetadataError():
            return Untrusted("freeze", f"the metadata have expired: {exc}", "Is the coordinator's clock right?")
        case exceptions.UnsignedMetadataError():
            return Untrusted("unknown_signer", f"the metadata are signed by others than they must be: {exc}")
        case _:
            return Untrusted("arbitrary", f"the metadata do not hold: {exc}")
