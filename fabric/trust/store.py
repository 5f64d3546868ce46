"""A node's, or a region's, side of trust: the root that it was given, and the newest metadata that it has verified.

    root.json timestamp.json snapshot.json targets.json    verified, and the counters that go with them
    pin                                                    VERSION:SHA256 of the root that a join token named
    time                                                   (trusted_time)

Every file is written as a whole and synced: what was seen once is not forgotten by a power cut.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import fields
from pathlib import Path

from fedtide.fabric.messages.trust import TrustKnown, TrustMetadata
from fedtide.fabric.process.files import write_atomically
from fedtide.fabric.trust.chain import Chain, Files
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.trusted_time import TrustedTime

log = logging.getLogger(__name__)


def digest_of(root: str) -> str:
    return hashlib.sha256(root.encode()).hexdigest()


def pin_of(root: str) -> str:
    """What a join token says of a root."""
    return f"{Chain(Files(root)).root.version}:{digest_of(root)}"


class TrustStore:
    """Owns its folder. Without a root nothing is verified: the installation has none, or is of a version before 0.3."""

    def __init__(self, folder: Path, root: str = "") -> None:
        """`root`: one that the owner of this machine names, instead of a join token's."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.time = TrustedTime(folder / "time")
        self.chain: Chain | None = None
        kept = {name: self._read(name) for name in (f.name for f in fields(Files))}
        if not kept["root"] and root:
            kept["root"] = root
        if kept["root"]:
            self.chain = Chain(Files(**kept))
            self._save(self.chain.files)

    @property
    def is_pinned(self) -> bool:
        """Whether there is a root, or a join token has named one: then nothing else is believed."""
        return self.chain is not None or bool(self.pin)

    @property
    def pin(self) -> str:
        return self._read_text("pin")

    def set_pin(self, pin: str) -> None:
        """A join token names a root. One that this node does not follow is the owner's word: it begins anew."""
        if pin in self.history:
            return
        if self.chain is not None:
            log.warning("trust.another_root", extra={"pin": pin})
        for name in (*(f.name for f in fields(Files)), "time", "history"):
            (self._folder / _file(name)).unlink(missing_ok=True)
        self.chain, self.time = None, TrustedTime(self._folder / "time")
        write_atomically(self._folder / "pin", pin.encode())

    @property
    def history(self) -> list[str]:
        """The roots that it has followed, as pins."""
        return self._read_text("history").split()

    @property
    def known(self) -> TrustKnown:
        """What to ask newer metadata for."""
        if self.chain is not None:
            return self.chain.known
        wanted = int(self.pin.partition(":")[0] or 1)
        return TrustKnown(root=wanted - 1)

    def now(self) -> float:
        return self.time.now()

    def take(self, offered: TrustMetadata) -> None:
        """Verify metadata and keep what is newer.

        Raises:
            Untrusted: they are not those of the root; what holds of them is kept.
        """
        chain = self.chain or self._first(offered)
        if chain is None:
            return
        # By a time that lags behind nothing has expired that holds: what has is found when it is used.
        updated, refusal = chain.updated(offered, self.time.now())
        if updated.files != (self.chain.files if self.chain is not None else None):
            self._save(updated.files)
        if self.chain is not None and updated.vouchers != self.chain.vouchers:
            self.time.begin_at(updated.issued)  # whoever vouched before may have been wrong by years
        self.chain = updated
        self.told(updated.issued)
        if refusal is not None:
            raise refusal

    def told(self, at: float) -> None:
        """A signed time. It never goes past what the offline keys have signed: nobody else may end their word."""
        if self.chain is not None:
            self.time.told(min(at, self.chain.horizon))

    def _first(self, offered: TrustMetadata) -> Chain | None:
        if not offered.roots:
            return None
        root, pin = offered.roots[0], self.pin
        if pin and pin.partition(":")[2] != digest_of(root):
            raise Untrusted(
                "arbitrary",
                f"the root that came is not the one of the join token ({digest_of(root)[:12]}, not {pin})",
                "Make a new token if the installation has a new root",
            )
        if not pin:
            log.warning("trust.pinned_on_first_use", extra={"root": digest_of(root)})
        return Chain(Files(root))

    def _save(self, files: Files) -> None:
        for name, text in ((f.name, getattr(files, f.name)) for f in fields(files)):
            if text != self._read(name):
                write_atomically(self._folder / _file(name), text.encode())
        pin = pin_of(files.root)
        if pin not in self.history:
            write_atomically(self._folder / "history", "\n".join([*self.history, pin]).encode())

    def _read(self, name: str) -> str:
        return self._read_text(_file(name))

    def _read_text(self, name: str) -> str:
        try:
            return (self._folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""


def _file(name: str) -> str:
    return f"{name}.json" if name in {f.name for f in fields(Files)} else name
