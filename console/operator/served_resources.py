"""Whether the API server serves our resources: the operator begins when it does, and anew when they were made anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from fedtide.console.operator.resources import GROUP, NEEDED, VERSION
from fedtide.fabric.cluster.connection import api_client
from fedtide.fabric.errors import TransientError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 3.0
Discover = Callable[[], frozenset[str]]


def discover() -> frozenset[str]:
    """What of our resources the API server serves, with the verbs: `federatedruns get list ...`.

    Raises:
        TransientError: it does not answer.
    """
    try:
        found = client.CustomObjectsApi(api_client()).get_api_resources(GROUP, VERSION)
    except (ApiException, HTTPError) as exc:
        if getattr(exc, "status", None) == HTTPStatus.NOT_FOUND:
            return frozenset()
        raise TransientError(f"the Kubernetes API does not answer: {str(exc).splitlines()[0]}") from exc
    return frozenset(f"{each.name} {' '.join(sorted(each.verbs))}" for each in found.resources)


async def keep_running(run: Callable[[asyncio.Event], Awaitable[None]], look: Discover = discover) -> None:
    """Run the operator while all resources are served; again, from the start, whenever what is served has changed.

    Args:
        run: ends soon after its event is set.
    """
    while True:
        served, stop = await _until_served(look), asyncio.Event()
        running = asyncio.ensure_future(run(stop))
        try:
            while not running.done() and await _served_still(look, served):
                await asyncio.wait({running}, timeout=LOOK_EVERY_S)
            if running.done():
                return
            log.warning("operator.begins_anew", extra={"reason": "other resources are served than before"})
        finally:
            stop.set()
            await running


async def _until_served(look: Discover) -> frozenset[str]:
    said = ""
    while True:
        try:
            served = await asyncio.to_thread(look)
            why = "its CustomResourceDefinitions are not there (deploy/cloud/fedtide/crds)"
        except TransientError as exc:
            served, why = frozenset(), str(exc)
        if set(NEEDED) <= {each.partition(" ")[0] for each in served}:
            return served
        if why != said:
            log.warning("operator.waits", extra={"reason": why})
            said = why
        await asyncio.sleep(LOOK_EVERY_S)


async def _served_still(look: Discover, served: frozenset[str]) -> bool:
    try:
        return await asyncio.to_thread(look) == served
    except TransientError:
        return True  # kopf tries again by itself
