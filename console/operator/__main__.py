"""`python -m fedtide.console.operator`: the operator of custom resources, in a pod.

--namespace NAMESPACE                    serve the resources there
--namespace NAMESPACE --let-go           before it is uninstalled: resources go without it from now on
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys

import kopf

from fedtide.console.client import AsyncClient, Client
from fedtide.console.operator.finalizers import let_go
from fedtide.console.operator.following import Following
from fedtide.console.operator.handlers import handlers, settings
from fedtide.console.operator.news import News
from fedtide.console.operator.served_resources import keep_running
from fedtide.fabric import logs
from fedtide.fabric.process.listening import in_url

POD_IP = "POD_IP"
"""Environment variable, set by the chart: where the kubelet asks for this pod's health."""
HEALTH_PORT = 8081
IDENTITY = "POD_ID"
"""Environment variable: by which kopf tells operators apart."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--namespace", required=True, help="Namespace of the resources")
    parser.add_argument("--let-go", action="store_true", help="Take the finalizers away, and end")
    asked = parser.parse_args()
    logs.to_stderr()
    if asked.let_go:
        let_go(asked.namespace)
        return 0
    os.environ.setdefault(IDENTITY, socket.gethostname())  # else kopf asks for the user's name: a pod's has none
    client = Client.find(by="operator")

    async def run(stop: asyncio.Event) -> None:
        api = AsyncClient.find(by="operator")
        news = News(api)
        listening = asyncio.create_task(news.listen(), name="news")
        try:
            await kopf.operator(
                registry=handlers(client, Following(api, news)),
                settings=settings(),
                namespaces=[asked.namespace],
                standalone=True,
                stop_flag=stop,
                liveness_endpoint=health_endpoint(os.environ.get(POD_IP, "127.0.0.1")),
            )
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await api.close()

    asyncio.run(keep_running(run))
    return 0


def health_endpoint(address: str) -> str:
    """On the pod's own address, of whichever family."""
    return f"http://{in_url(address)}:{HEALTH_PORT}/healthz"


if __name__ == "__main__":
    sys.exit(main())
