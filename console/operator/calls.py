"""Calls of the coordinator's API from handlers, and their outcome as a resource's status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeVar

import kopf

from fedtide.console.client import ApiError
from fedtide.console.operator import resources
from fedtide.console.operator.resources import Object
from fedtide.fabric.errors import ConfigError, TransientError

RETRY_S = 5.0

V = TypeVar("V")


def call(ask: Callable[[], V]) -> V:
    """An API call, with its errors mapped to kopf's: transient ones are retried."""
    try:
        return ask()
    except TransientError as exc:
        raise kopf.TemporaryError(str(exc), delay=RETRY_S) from exc
    except (ApiError, ConfigError) as exc:
        if is_transient(exc):
            raise kopf.TemporaryError(str(exc), delay=RETRY_S) from exc
        raise kopf.PermanentError(str(exc)) from exc


def is_transient(exc: Exception) -> bool:
    """Whether it is the coordinator that cannot now: a full store, a change of leaders, an error of its own."""
    return isinstance(exc, ApiError) and exc.status >= HTTPStatus.INTERNAL_SERVER_ERROR


def apply(ask: Callable[[], V], show: Callable[[V, int], Object], patch: kopf.Patch, meta: kopf.Meta) -> bool:
    """Submit a spec, and write the resulting view or the refusal into the status; returns whether it was taken."""
    try:
        status = show(call(ask), generation(meta))
    except kopf.PermanentError as exc:
        write(patch, resources.refused(str(exc), generation(meta)), {})
        return False
    write(patch, status, {})
    return True


def write(patch: kopf.Patch, status: Object, old: Mapping[str, Any]) -> None:
    """Into the patch, if it is another than `old`."""
    new = changed(status, old)
    if new is not None:
        patch.status.update(new)


def changed(status: Object, old: Mapping[str, Any]) -> Object | None:
    """The status with the times of its conditions; None: it is the `old` one."""
    new = resources.with_times(status, old, datetime.now(UTC))
    return new if any(old.get(name) != value for name, value in new.items()) else None


def generation(meta: kopf.Meta) -> int:
    return int(meta.get("generation") or 0)
