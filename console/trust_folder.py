"""The folder in which offline keys work: the metadata that are published, and the next ones while signatures lack.

trust-roots.json trust-targets.json     what has all its signatures
root.next.json targets.next.json        what others must sign too (`fedtide trust sign`)
*.pem                                   keys, if they are kept here
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from fedtide.fabric.errors import ConfigError
from fedtide.fabric.messages.trust import TrustMetadata
from fedtide.fabric.nats.credentials import write_secret
from fedtide.fabric.trust import ceremony, keys
from fedtide.fabric.trust.installation import ROOTS, TARGETS
from fedtide.fabric.trust.libraries import Key, Signer

NEXT_ROOT, NEXT_TARGETS = "root.next.json", "targets.next.json"


class TrustFolder:
    """Reads and writes one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: dict[str, str | None] = {}

    @property
    def is_begun(self) -> bool:
        return (self.path / ROOTS).exists()

    @property
    def roots(self) -> list[str]:
        """Raises ConfigError: there are none."""
        try:
            found: list[str] = json.loads((self.path / ROOTS).read_bytes())
        except (OSError, ValueError) as exc:
            remedy = "fedtide trust init FOLDER, or name the folder with --folder"
            raise ConfigError(str(self.path / ROOTS), f"cannot be read: {exc}", remedy) from exc
        return found

    @property
    def targets(self) -> str:
        return (self.path / TARGETS).read_text(encoding="utf-8")

    @property
    def metadata(self) -> TrustMetadata:
        """What there is to publish."""
        return TrustMetadata(roots=self.roots, targets=self.targets)

    def begin(self, root: str, targets: str) -> None:
        write_secret(self.path / TARGETS, targets)
        write_secret(self.path / ROOTS, json.dumps([root]))

    def replace(self, known: TrustMetadata) -> None:
        """What a coordinator has, instead of what is here; what waits for signatures goes too."""
        write_secret(self.path / ROOTS, json.dumps(known.roots))
        write_secret(self.path / TARGETS, known.targets)
        for name in (NEXT_ROOT, NEXT_TARGETS):
            (self.path / name).unlink(missing_ok=True)

    def check_nothing_waits(self) -> None:
        """Raises ConfigError: metadata wait for signatures, and others would take their place."""
        self._before = {name: self._text(name) for name in (ROOTS, TARGETS, NEXT_ROOT, NEXT_TARGETS)}
        if waiting := [name for name in (NEXT_ROOT, NEXT_TARGETS) if (self.path / name).exists()]:
            remedy = "`fedtide trust sign` first; or remove the file, and what was asked for with it"
            raise ConfigError(str(self.path / waiting[0]), "waits for signatures", remedy)

    def undo(self) -> None:
        """As it was when `check_nothing_waits` was called."""
        for name, text in self._before.items():
            if text is None:
                (self.path / name).unlink(missing_ok=True)
            else:
                write_secret(self.path / name, text)

    def _text(self, name: str) -> str | None:
        file = self.path / name
        return file.read_text(encoding="utf-8") if file.exists() else None

    def signers(self, named: Sequence[str]) -> list[Signer]:
        """The offline keys that sign: those named, or those in this folder that the newest root names.

        Raises:
            ConfigError: there is none.
        """
        known = {key.keyid for key in ceremony.offline_in(self.roots[-1]).keys}
        names = list(named) or [
            str(file) for file in sorted(self.path.glob("root*.pem")) if keys.public_of(file).keyid in known
        ]
        if not names:
            raise ConfigError("--sign", f"no key of the root is in {self.path}", "Name its file, or hsm:...")
        return [keys.load(name) for name in names]

    def next_targets(self, roles: dict[str, ceremony.Role], signers: Sequence[Signer], now: datetime) -> int:
        """What is delegated from now on; returns how many signatures lack."""
        version = ceremony.read_targets(self.targets).version + 1
        return self._keep_targets(ceremony.targets(roles, signers, now, version))

    def next_root(self, root: str) -> int:
        """The root that follows; returns how many signatures lack."""
        return self._keep_root(root)

    def sign(self, signers: Sequence[Signer]) -> dict[str, int]:
        """Sign what waits for signatures; returns how many lack, by file."""
        left = {}
        for name, keep in ((NEXT_ROOT, self._keep_root), (NEXT_TARGETS, self._keep_targets)):
            file = self.path / name
            if file.exists():
                left[name] = keep(ceremony.signed_too(file.read_text(encoding="utf-8"), signers))
        if not left:
            raise ConfigError(str(self.path), "holds nothing that waits for a signature")
        return left

    def _keep_targets(self, text: str) -> int:
        lacks = ceremony.missing_signatures(text, self._newest_root())
        self._keep(TARGETS if not lacks else NEXT_TARGETS, text, NEXT_TARGETS)
        return lacks

    def _keep_root(self, text: str) -> int:
        lacks = ceremony.missing_signatures(text, text, self.roots[-1])
        if lacks:
            write_secret(self.path / NEXT_ROOT, text)
        else:
            write_secret(self.path / ROOTS, json.dumps([*self.roots, text]))
            (self.path / NEXT_ROOT).unlink(missing_ok=True)
        return lacks

    def _newest_root(self) -> str:
        waiting = self.path / NEXT_ROOT
        return waiting.read_text(encoding="utf-8") if waiting.exists() else self.roots[-1]

    def _keep(self, name: str, text: str, waiting: str) -> None:
        write_secret(self.path / name, text)
        if name != waiting:
            (self.path / waiting).unlink(missing_ok=True)

    def new_key(self, name: str, passphrase: str = "") -> tuple[Path, Key]:
        """A new key in a file of this folder that is not there yet."""
        number = 1
        while (file := self.path / (f"{name}.pem" if number == 1 else f"{name}-{number}.pem")).exists():
            number += 1
        signer = keys.new()
        keys.save(signer, file, passphrase)
        return file, signer.public_key
