"""`python -m fedtide.coordinator.release_authority CONFIG.json`: vouches for releases while it runs.

It keeps its own copy of the metadata, from a root that is in its configuration; what a coordinator sends is checked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
from pathlib import Path

from pydantic import ValidationError

from fedtide.coordinator.release_authority.config import AuthorityConfig
from fedtide.coordinator.release_authority.judgement import judge
from fedtide.coordinator.release_authority.signed_before import SignedBefore
from fedtide.fabric import logs
from fedtide.fabric.encoding import from_json, to_json
from fedtide.fabric.errors import BrokerUnavailable, ConfigError, FedtideError, MalformedMessage
from fedtide.fabric.messages.attestation import AttestationGiven, AttestationWanted
from fedtide.fabric.nats.broker import Broker
from fedtide.fabric.nats.credentials import Access
from fedtide.fabric.nats.jetstream import Received
from fedtide.fabric.nats.subjects import Subjects
from fedtide.fabric.process.until_signalled import until_signalled
from fedtide.fabric.trust import keys, provenance
from fedtide.fabric.trust.refusals import Untrusted
from fedtide.fabric.trust.store import TrustStore
from fedtide.fabric.validation import config_error

log = logging.getLogger(__name__)


class ReleaseAuthority:
    """Answers one request after the other."""

    def __init__(self, config: AuthorityConfig) -> None:
        """Raises ConfigError: a file is missing or wrong."""
        try:
            first = json.loads(config.roots.read_bytes())[0]
        except (OSError, ValueError, LookupError) as exc:
            raise ConfigError(str(config.roots), f"holds no root: {exc}", "fedtide trust init") from exc
        self._store = TrustStore(config.folder / "trust", root=first)
        self._before = SignedBefore(config.folder / "signed")
        self._signer = keys.load(config.key)
        self._one_at_a_time = asyncio.Lock()

    async def on_request(self, message: Received) -> tuple[bytes, dict[str, str]]:
        async with self._one_at_a_time:
            try:
                given = AttestationGiven(envelope=self.vouch(from_json(AttestationWanted, message.data, "request")))
            except (Untrusted, MalformedMessage) as exc:
                log.warning("release.not_signed", extra={"reason": str(exc)})
                given = AttestationGiven(error=exc.what, remedy=exc.remedy)
        return to_json(given), {}

    def vouch(self, wanted: AttestationWanted) -> str:
        """The envelope of a release that may be vouched for. Raises Untrusted, MalformedMessage."""
        self._store.take(wanted.trust)
        chain, now = self._store.chain, self._store.now()
        assert chain is not None
        manifest = judge(chain, wanted, now)
        envelope = provenance.sealed(wanted.statement, [self._signer])
        provenance.attested(chain, wanted.manifest, envelope, now)  # else this key may not, or not for this model
        self._before.add(manifest, hashlib.sha256(wanted.manifest).hexdigest())
        log.info("release.signed", extra={"release": provenance.named(manifest), "run": manifest.lineage.run})
        return envelope


async def _serve(config: AuthorityConfig) -> None:
    authority = ReleaseAuthority(config)
    access = Access(config.credentials, config.ca_file)
    broker = await Broker.connect(config.nats_url, "release-authority", access, wait_s=None)
    await broker.answer(Subjects(config.tenant).signing, authority.on_request)
    log.info("authority.ready")
    await broker.until_closed()


def main() -> int:
    logs.to_stderr()
    try:
        file = Path(sys.argv[1])
        config = AuthorityConfig.model_validate_json(file.read_bytes()).below(file.resolve().parent)
        if asyncio.run(until_signalled(_serve(config))):
            return 0
    except ValidationError as exc:
        print(f"release authority: {config_error(exc, AuthorityConfig, sys.argv[1])}", file=sys.stderr)
        return ConfigError.exit_code
    except FedtideError as exc:
        log.error("authority.ended", extra={"reason": str(exc)})
        return exc.exit_code
    return BrokerUnavailable.exit_code


if __name__ == "__main__":
    sys.exit(main())
