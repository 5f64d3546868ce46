"""Watching objects of one kind: list, watch, and resume after any interruption.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import urllib3
from kubernetes import watch
from kubernetes.client.exceptions import ApiException

log = logging.getLogger(__name__)

_GONE = 410
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
SERVER_S = 240
"""The server ends a watch after this time; it is then resumed."""

Changed = Callable[[str, dict[str, Any]], object]
"""`ADDED`, `MODIFIED`, `DELETED`, or `LISTED` for what was there; and the object as it came over the wire."""


class ObjectWatch:
    """A thread that calls `changed`; if a watch cannot be resumed, it lists all objects again.

    Args:
        listing: a client's list call, e.g. `BatchV1Api().list_namespaced_job`.
        arguments: for that call.
        relisted: called with the names of all existing objects, after every list.
    """

    def __init__(
        self, listing: Any, arguments: dict[str, Any], changed: Changed, relisted: Callable[[set[str]], object]
    ) -> None:
        self._listing = listing
        self._arguments = arguments
        self._changed = changed
        self._relisted = relisted
        self._ended = threading.Event()
        self._watch = watch.Watch()
        self._thread = threading.Thread(target=self._run, name="object-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Deliver nothing any more. The thread ends with its connection."""
        self._ended.set()
        self._watch.stop()

    def _run(self) -> None:
        version, wait_s = "", FIRST_WAIT_S
        while not self._ended.is_set():
            try:
                version = version or self._list()
                version = self._follow(version)
                wait_s = FIRST_WAIT_S
            except ApiException as exc:
                log.info("watch.interrupted", extra={"status": exc.status, "reason": exc.reason})
                version = "" if exc.status == _GONE else version
                self._ended.wait(_asked_to_wait(exc) or wait_s * random.uniform(0.5, 1.0))  # noqa: S311  # spreads load
                wait_s = min(LONGEST_WAIT_S, wait_s * 2)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as exc:
                log.info("watch.disconnected", extra={"reason": str(exc)})
                self._ended.wait(wait_s)
                wait_s = min(LONGEST_WAIT_S, wait_s * 2)

    def _list(self) -> str:
        found = self._listing(**self._arguments, _preload_content=False, _request_timeout=(5.0, 30.0))
        body = _json(found)
        for item in body["items"]:
            self._tell("LISTED", item)
        if not self._ended.is_set():
            self._relisted({item["metadata"]["name"] for item in body["items"]})
        return str(body["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> str:
        stream = self._watch.stream(
            self._listing,
            **self._arguments,
            resource_version=version,
            timeout_seconds=SERVER_S,
            _request_timeout=SERVER_S + 30,
        )
        for event in stream:
            raw = event["raw_object"]
            version = raw["metadata"]["resourceVersion"]
            self._tell(event["type"], raw)
        return version

    def _tell(self, kind: str, item: dict[str, Any]) -> None:
        if not self._ended.is_set():
            self._changed(kind, item)


def _json(response: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(response.data)
    return body


def _asked_to_wait(error: ApiException) -> float | None:
    try:
        return float(error.headers["Retry-After"])
    except (TypeError, ValueError, KeyError):
        return None
