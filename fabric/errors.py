"""The error vocabulary, sorted by reaction: wait, refuse, crash, or fix the configuration.

Every error carries what happened and, for a person, what to do next. Library errors are
translated once, at the adapter that meets them.
"""

from __future__ import annotations


class FedtideError(Exception):
    """Root of every error that this project raises on purpose."""

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        stop = "" if what.endswith(("?", ".", "!")) else "."
        super().__init__(f"{what}{stop} {remedy}" if remedy else what)


class TransientError(FedtideError):
    """The same call may succeed later: broker away, deadline passed, disk full for now."""

    exit_code = 75


class OutOfMemory(FedtideError):
    """It does not fit into this machine, or its GPU; into a larger one it may."""

    exit_code = 71


class BrokerUnavailable(TransientError):
    """No answer from the NATS server (or from the JetStream domain that was asked)."""


class StoreFull(BrokerUnavailable):
    """A stream, or the store of its server, has no room for this."""


class CredentialsRefused(FedtideError):
    """The broker does not let this process in: what it shows is revoked, expired or foreign."""

    exit_code = 77


class RemoteError(FedtideError):
    """A peer sent something that we refuse; it is counted, and we go on."""

    exit_code = 65


class DigestMismatch(RemoteError):
    """Bytes that do not hash to the digest they were addressed by."""


class MalformedMessage(RemoteError):
    """A message, frame or manifest that does not decode."""


class TooLarge(RemoteError):
    """A message over the broker's limit: sending it again would not help."""


class LogLost(FedtideError):
    """The event log ends before a snapshot of it: going on would forget what was decided."""

    exit_code = 2


class NotFound(FedtideError):
    """The thing that was named does not exist."""

    exit_code = 4


class StaleWriter(FedtideError):
    """Another writer has appended to the event log: this process no longer leads."""

    exit_code = 76


class InvalidTransition(FedtideError):
    """A local event that the current state does not allow; the state is unchanged."""

    exit_code = 70


class ReducerFailed(InvalidTransition):
    """An event that the state does not take because of an error of ours."""


class Conflict(FedtideError):
    """A person's request that the present state does not allow; nothing has changed."""

    exit_code = 2


class ConfigError(FedtideError):
    """Something a person wrote is wrong; `path` names the field or file."""

    exit_code = 2

    def __init__(self, path: str, what: str, remedy: str = "") -> None:
        self.path = path
        self.problem = what
        super().__init__(f"{path}: {what}", remedy)


class CapabilityMissing(FedtideError):
    """This installation lacks an extra that the request needs."""

    exit_code = 69
