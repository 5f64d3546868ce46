"""The director: signs what goes down, vouches every day for the metadata, and takes newer ones from the offline keys.

Its keys are in the folder of identities: `director*.pem` sign orders, `timestamp*.pem` vouch. Of several, those sign to
whom it is delegated now: so a new key lies there before the metadata name it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from fedtide.coordinator.identity import trust
from fedtide.coordinator.log.engine import Engine
from fedtide.fabric.errors import ConfigError, Conflict, TransientError
from fedtide.fabric.events.identity import TrustPublished, TrustVouched
from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata
from fedtide.fabric.messages.views import DelegationView, TrustView
from fedtide.fabric.plans.run_spec import AppRef
from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.chain import Chain, Files
from fedtide.fabric.trust.claims import publishers_of
from fedtide.fabric.trust.installation import ROOT, ROOTS, TARGETS
from fedtide.fabric.trust.libraries import Signer
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.signatures import AT, SIGNATURE, Mandate, header_of, mandate_of, sign, signed_bytes
from fedtide.fabric.trust.store import pin_of

log = logging.getLogger(__name__)

VOUCH_EVERY_S = 86_400.0
LOOK_EVERY_S = 60.0
MANDATE_S = 86_400.0
"""So long the mandate of a run's aggregator is good at least; it gets another before."""
WARN_BEFORE_S = 30 * 86_400.0


class Director:
    """Of one installation; where it has no keys, nothing is signed, and nodes that follow a root follow nothing."""

    def __init__(self, engine: Engine, folder: Path | None) -> None:
        self._engine = engine
        self._folder = folder
        self._one_at_a_time = asyncio.Lock()
        self._loaded: dict[Path, tuple[int, Signer]] = {}
        self._chain: tuple[tuple[str, str, str], Chain] | None = None

    @property
    def _trust(self) -> trust.Trust:
        return self._engine.world.trust

    @property
    def _known_version(self) -> int:
        return ceremony.read_targets(self._trust.targets).version if self._trust.targets else 0

    @property
    def is_used(self) -> bool:
        return self._trust.is_used

    @property
    def pin(self) -> str:
        """Of the newest root, for join tokens; empty: there is none."""
        return pin_of(self._trust.roots[-1]) if self.is_used else ""

    def root_file(self) -> dict[str, str]:
        """The newest root, for processes of regions, by its file's name."""
        return {ROOT: self._trust.roots[-1]} if self.is_used else {}

    def newer_than(self, known: TrustKnown) -> TrustMetadata | None:
        return self._trust.newer_than(known) if self.is_used else None

    async def begin(self) -> None:
        """Take over what lies in the folder, if that is newer than the log's, and vouch for it."""
        if self._folder is not None and (self._folder / ROOTS).exists():
            try:
                roots = json.loads((self._folder / ROOTS).read_bytes())
                targets = (self._folder / TARGETS).read_text(encoding="utf-8")
                offered = TrustMetadata(roots=roots, targets=targets)
                if not self.is_used or ceremony.read_targets(targets).version > self._known_version:
                    await self.publish(offered, by="the folder of identities")
            except (OSError, ValueError, ConfigError, Conflict) as exc:
                log.error("trust.not_taken", extra={"reason": str(exc)})
        await self._vouch_if_due()

    async def keep(self) -> None:
        """Vouch in time, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(TransientError):
                await self._vouch_if_due()

    async def _vouch_if_due(self) -> None:
        if not self.is_used:
            return
        chain, due = self._chain_now(), True
        if chain.timestamp is not None and chain.targets is not None and self._trust.timestamp:
            about = json.loads(self._trust.snapshot)["signed"]["meta"]["targets.json"]["version"]
            named = about == ceremony.read_targets(self._trust.targets).version
            due = not named or chain.issued + VOUCH_EVERY_S < _now() or self._vouches_with_another_key()
        if due:
            await self._vouch()

    def _vouches_with_another_key(self) -> bool:
        signed = {each["keyid"] for each in json.loads(self._trust.timestamp)["signatures"]}
        return signed.isdisjoint(key.keyid for key in ceremony.offline_in(self._trust.roots[-1]).timestamp)

    async def _vouch(self) -> None:
        allowed = {key.keyid for key in ceremony.offline_in(self._trust.roots[-1]).timestamp}
        signer = next((s for s in self._signers("timestamp") if s.public_key.keyid in allowed), None)
        if signer is None:
            log.error("trust.cannot_vouch", extra={"reason": "no timestamp*.pem here is one that the root names"})
            return
        version, targets = self._trust.version + 1, ceremony.read_targets(self._trust.targets)
        timestamp, snapshot = ceremony.vouched(targets.version, version, signer, datetime.now(UTC))
        await self._engine.submit(TrustVouched(version=version, timestamp=timestamp, snapshot=snapshot))

    async def publish(self, offered: TrustMetadata, by: str) -> None:
        """Take newer metadata from the offline keys. What is known already changes nothing.

        Raises:
            ConfigError: they are not signed by those who must sign them, or would leave this coordinator without keys.
            Conflict: they are older than what is known.
        """
        async with self._one_at_a_time:
            await self._publish(offered, by)

    async def _publish(self, offered: TrustMetadata, by: str) -> None:
        known = self._trust
        roots = _after(known.roots, offered.roots)
        newest = [*known.roots, *roots]
        if not newest:
            raise ConfigError("roots", "are missing", "fedtide trust init")
        for before, root in zip([None, *newest][len(known.roots) :], roots, strict=False):
            _check_root(before, root)
        targets = offered.targets or known.targets
        if not targets:
            raise ConfigError("targets", "are missing", "fedtide trust init")
        about = ceremony.read_targets(targets)
        version = ceremony.read_targets(known.targets).version if known.targets else 0
        if about.version < version:
            raise Conflict("the metadata `targets` are older than those that are known", "fedtide trust pull")
        if about.version == version and targets != known.targets:
            raise Conflict(f"other metadata `targets` of version {version} are known", "fedtide trust pull")
        for file in (about, ceremony.read_root(newest[-1])):
            if file.expires.timestamp() <= _now():
                remedy = "fedtide trust refresh; is the clock right where they were signed?"
                raise ConfigError(str(file.type), f"expired on {file.expires:%Y-%m-%d}", remedy)
        if lacks := ceremony.missing_signatures(targets, newest[-1]):
            raise ConfigError("targets", f"lack {lacks} signature(s)", "fedtide trust sign")
        self._check_own_keys(newest[-1], targets)
        if roots or targets != known.targets:
            await self._engine.submit(TrustPublished(after=len(known.roots), roots=roots, targets=targets, by=by))
            await self._vouch()

    def _check_own_keys(self, root: str, targets: str) -> None:
        named = {key.keyid for key in ceremony.offline_in(root).timestamp}
        if named.isdisjoint(s.public_key.keyid for s in self._signers("timestamp")):
            raise ConfigError(
                "roots", "name no timestamp key that this coordinator has", "Give it the key first: timestamp-2.pem"
            )
        if not self._directing(targets):
            raise ConfigError(
                "targets",
                "delegate to no director key that this coordinator has: no node would follow it any more",
                "Give it the key first: director-2.pem in its folder of identities (a tenant: fedtide tenant keys)",
            )

    def _directing(self, targets: str) -> list[Signer]:
        roles = ceremony.roles_in(targets)
        named = {key.keyid for name, role in roles.items() if _directs(name) for key in role.keys}
        return [signer for signer in self._signers("director") if signer.public_key.keyid in named]

    def _signers(self, kind: str) -> list[Signer]:
        """Read again whenever a file has changed."""
        if self._folder is None:
            return []
        found = []
        for file in sorted(self._folder.glob(f"{kind}*.pem")):
            try:
                changed = file.stat().st_mtime_ns
                if self._loaded.get(file, (0,))[0] != changed:
                    self._loaded[file] = changed, keys.load(file)
                found.append(self._loaded[file][1])
            except (OSError, ConfigError) as exc:
                log.error("trust.key_unreadable", extra={"file": file.name, "reason": str(exc)})
        return found

    @property
    def key_ids(self) -> str:
        """Of the keys that sign now: what was signed with others has to be signed anew."""
        signers = self._directing(self._trust.targets) if self.is_used else []
        return ",".join(signer.public_key.keyid for signer in signers)

    def headers(self, subject: str, body: bytes, at: str = "") -> dict[str, str]:
        """The signature over a message.

        Args:
            at: what it is an answer to, or when it was signed: so that it is good for nothing else.

        Raises:
            TransientError: this coordinator has no key to whom that is delegated.
        """
        if not self.is_used:
            return {}
        signers = self._directing(self._trust.targets)
        if not signers:
            raise TransientError("no director*.pem here is one that the metadata name", "fedtide trust show")
        made = sign(signers, signed_bytes(subject, body, at))
        return {SIGNATURE: header_of(made), **({AT: at} if at else {})}

    def at_headers(self, subject: str, body: bytes) -> dict[str, str]:
        """As `headers`, of a question that is asked now."""
        return self.headers(subject, body, f"{_now():.3f}")

    def mandate(self, run: str, attempt: int, app: str, key: str, for_s: float) -> str:
        """Lets the holder of a key speak for a run; empty: this installation signs nothing."""
        if not self.is_used:
            return ""
        ends_at = _now() + max(MANDATE_S, for_s)
        mandate = Mandate(run=run, attempt=attempt, app=app, key=key, ends_at=ends_at)
        return mandate_of(self._directing(self._trust.targets), mandate)

    def check_app(self, app: AppRef) -> None:
        """Raises ConfigError: no publisher vouches for it, so no node would train it."""
        if not self.is_used:
            return
        try:
            publishers_of(self._chain_now(), app, _now())
        except Untrusted as exc:
            remedy = "Name a publisher's key with $FEDTIDE_SIGNING_KEY, and start it with the CLI"
            raise ConfigError("app", f"{app.name}: {exc.what}", remedy) from exc

    @property
    def chain(self) -> Chain:
        return self._chain_now()

    def _chain_now(self) -> Chain:
        now = self._trust
        key = now.roots[-1], now.timestamp, now.targets
        if self._chain is None or self._chain[0] != key:
            self._chain = key, Chain(Files(now.roots[-1], now.timestamp, now.snapshot, now.targets))
        return self._chain[1]

    def warnings(self) -> list[str]:
        """What a person should know."""
        if not self.is_used:
            return []
        chain = self._chain_now()
        found = [
            f"the metadata `{file.type}` expire on {file.expires:%Y-%m-%d}: fedtide trust refresh"
            for file in (chain.root, chain.targets)
            if file is not None and file.expires.timestamp() - _now() < WARN_BEFORE_S
        ]
        if not self._directing(self._trust.targets):
            found.append("this coordinator has no key to whom orders are delegated: nodes do not follow it")
        return found

    def view(self) -> TrustView:
        """Raises ConfigError: there is no root."""
        if not self.is_used:
            raise ConfigError("trust", "this installation has no root", "fedtide trust init, and `trust publish`")
        known, chain = self._trust, self._chain_now()
        roles = ceremony.roles_in(known.targets)
        assert chain.targets is not None
        return TrustView(
            metadata=TrustMetadata(
                roots=list(known.roots), timestamp=known.timestamp, snapshot=known.snapshot, targets=known.targets
            ),
            pin=self.pin,
            root_expires=chain.root.expires,
            targets_expires=chain.targets.expires,
            roles=[
                DelegationView(
                    role=name, keys=[k.keyid for k in role.keys], threshold=role.threshold, paths=list(role.paths)
                )
                for name, role in roles.items()
            ],
        )


def _directs(role: str) -> bool:
    return role == ceremony.DIRECTOR or role.startswith(f"{ceremony.DIRECTOR}-")


def _after(known: tuple[str, ...], offered: list[str]) -> list[str]:
    """The roots that follow those that are known; what is offered may begin before them."""
    fresh = [root for root in offered if ceremony.read_root(root).version > len(known)]
    for number, root in enumerate(offered):
        version = ceremony.read_root(root).version
        if version <= len(known) and known[version - 1] != root:
            raise Conflict(f"root {version} is another one than the one that is known", "Roots are never replaced")
        if version != ceremony.read_root(offered[0]).version + number:
            raise ConfigError("roots", "are not of consecutive versions, the oldest first")
    if fresh and ceremony.read_root(fresh[0]).version != len(known) + 1:
        raise ConfigError("roots", f"begin with version {ceremony.read_root(fresh[0]).version}, not {len(known) + 1}")
    return fresh


def _check_root(before: str | None, root: str) -> None:
    if lacks := ceremony.missing_signatures(root, root, before or ""):
        version = ceremony.read_root(root).version
        raise ConfigError("roots", f"version {version} lacks {lacks} signature(s)", "fedtide trust sign")


def _now() -> float:
    return datetime.now(UTC).timestamp()
