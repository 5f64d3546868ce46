"""`python -m fedtide.console.operator`: the operator of custom resources, in a pod."""

from __future__ import annotations

import argparse
import asyncio
import sys

import kopf

from fedtide.console.client import Client
from fedtide.console.operator.handlers import handlers, settings
from fedtide.fabric import logs


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--namespace", required=True, help="Namespace of the resources")
    asked = parser.parse_args()
    logs.to_stderr()
    run = kopf.operator(
        registry=handlers(Client.find(by="operator")),
        settings=settings(),
        namespaces=[asked.namespace],
        standalone=True,
        liveness_endpoint="http://0.0.0.0:8081/healthz",
    )
    asyncio.run(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
