"""Calls of the Kubernetes API from asyncio, with its errors as ours."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException

from fedtide.fabric.errors import TransientError

TIMEOUT_S = (5.0, 30.0)
"""Timeouts: to connect, and between two parts of an answer."""
_ABSENT, _EXISTS, _BUSY = 404, 409, 429


class ApiRefused(TransientError):
    """The API server refuses a request. Whether trying again helps depends on the request."""


class Exists(ApiRefused):
    """An object of that name exists already."""


async def call(function: Any, *arguments: Any, absent_is_fine: bool = False, **more: Any) -> Any:
    """One request, in a thread; errors as ours."""
    try:
        return await asyncio.to_thread(function, *arguments, _request_timeout=TIMEOUT_S, **more)
    except ApiException as exc:
        if exc.status == _ABSENT and absent_is_fine:
            return None
        if exc.status == _EXISTS:
            raise Exists(_message(exc)) from exc
        if exc.status == _BUSY or (exc.status or 500) >= 500:
            raise TransientError(f"the Kubernetes API says {exc.status}: {_message(exc)}") from exc
        raise ApiRefused(_remedy(exc)) from exc
    except (urllib3.exceptions.HTTPError, OSError) as exc:
        raise TransientError(f"the Kubernetes API does not answer: {exc}") from exc


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)


def _remedy(error: ApiException) -> str:
    said = _message(error)
    if "exceeded quota" in said:
        return f"{said}. Raise the namespace's ResourceQuota, or wait for other runs"
    if error.status in (401, 403):
        return f"{said}. The coordinator's Role lacks it: upgrade the Helm release"
    return f"the Kubernetes API refuses the Job: {said}"
