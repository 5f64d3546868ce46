"""Keeps a resource's status in step with what it stands for: looks when the coordinator's log says something of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import kopf
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from fedtide.console.client import ApiError, AsyncClient
from fedtide.console.endpoints import Call
from fedtide.console.operator import resources
from fedtide.console.operator.calls import RETRY_S, changed, is_transient
from fedtide.console.operator.news import News
from fedtide.console.operator.resources import GROUP, VERSION, Object
from fedtide.fabric.cluster.connection import api_client
from fedtide.fabric.errors import ConfigError, TransientError

LOOK_AGAIN_S = 15.0
"""News may be lost with a connection."""
SETTLE_S = 0.5
"""Events come in bursts: one look for all of them."""

T = TypeVar("T")
Seen = tuple[Object, frozenset[str]]
"""A status, and the names of what it is about."""


class Following:
    """Over one client and one stream of news for all resources. Made in the loop that it works in."""

    def __init__(self, api: AsyncClient, news: News) -> None:
        self._api = api
        self._news = news
        self._loop = asyncio.get_running_loop()

    def look_again(self, name: str) -> None:
        """From any thread: what is about `name` is looked at soon."""
        self._loop.call_soon_threadsafe(self._news.tell, frozenset({name}))

    async def ask(self, call: Call[T]) -> T:
        """Raises ApiError, ConfigError, TransientError as the client does."""
        return await self._api.send(call)

    async def ask_of(self, name: str, call: Callable[[str], Call[T]]) -> T | None:
        """As `ask`; None if there is no name."""
        if not name:
            return None
        found: T = await self.ask(call(name))
        return found

    async def follow(self, plural: str, body: kopf.Body, look: Callable[[Mapping[str, Any]], Awaitable[Seen]]) -> None:
        """Write what `look` sees into the status, until that has ended or the resource is gone.

        Args:
            look: what it says, given the status that the API server has now.

        Raises:
            kopf.PermanentError: the coordinator does not know it (any more).
        """
        with self._news.topic() as topic:
            while True:
                topic.changed.clear()
                pause = RETRY_S
                try:
                    there = await asyncio.to_thread(_read, plural, body.metadata)
                    if there is None:
                        return
                    now = there.get("status", {})
                    status, topic.names = await look(now)
                    if (new := changed(status, now)) is not None:
                        await asyncio.to_thread(_patch, plural, there["metadata"], new)
                    if resources.has_ended(status):
                        return
                    pause = LOOK_AGAIN_S
                except TransientError:
                    pass
                except (ApiError, ConfigError) as exc:
                    if not is_transient(exc):
                        raise kopf.PermanentError(str(exc)) from exc
                try:
                    async with asyncio.timeout(pause):
                        await topic.changed.wait()
                    await asyncio.sleep(SETTLE_S)
                except TimeoutError:
                    pass


def _read(plural: str, meta: Mapping[str, Any]) -> Object | None:
    """The resource as it is now; None: it is gone, or another one of its name.

    Raises:
        TransientError: the API server does not answer.
    """
    found = _asked("get_namespaced_custom_object", plural, meta)
    return found if found is not None and found["metadata"]["uid"] == meta["uid"] else None


def _patch(plural: str, meta: Mapping[str, Any], status: Object) -> None:
    """Raises TransientError: the API server does not take it, perhaps because somebody else wrote meanwhile."""
    of_version = {"metadata": {"resourceVersion": meta["resourceVersion"]}}  # a list of conditions is written whole
    _asked("patch_namespaced_custom_object_status", plural, meta, {**of_version, "status": status})


def _asked(verb: str, plural: str, meta: Mapping[str, Any], *body: Object) -> Object | None:
    api = client.CustomObjectsApi(api_client())
    try:
        found: Object = getattr(api, verb)(GROUP, VERSION, meta["namespace"], plural, meta["name"], *body)
    except ApiException as exc:
        if exc.status == HTTPStatus.NOT_FOUND:
            return None
        raise TransientError(f"{meta['name']}: the Kubernetes API says {exc.status} {exc.reason}") from exc
    except HTTPError as exc:
        raise TransientError(f"the Kubernetes API does not answer: {exc}") from exc
    return found
