"""The hash chain of the audit trail: who changes one entry has to change all that follow. Pure."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable

from fedtide.fabric.messages.people import AuditEntry


def hash_of(entry: AuditEntry) -> str:
    content = entry.model_dump(mode="json", exclude={"hash", "must_understand"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(entry: AuditEntry) -> AuditEntry:
    return entry.model_copy(update={"hash": hash_of(entry)})


def broken(entries: Iterable[AuditEntry]) -> str | None:
    """What is wrong with a part of the trail, oldest first, or None."""
    last: AuditEntry | None = None
    for entry in entries:
        if not hmac.compare_digest(entry.hash, hash_of(entry)):
            return f"entry {entry.number} was changed: it does not have the hash that stands in it"
        if last is not None and entry.number != last.number + 1:
            return f"entry {last.number + 1} is missing: {entry.number} follows {last.number}"
        if last is not None and entry.before != last.hash:
            return f"entry {entry.number} does not follow {last.number}: one of them was replaced"
        last = entry
    return None
