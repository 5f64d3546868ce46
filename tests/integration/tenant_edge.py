"""A tenant's own machines: a region's server linked to the shared hub, its agents, and a release authority."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import free_ports, nats_server
from fedtide.fabric.nats.authority import TRUST
from tests.integration.installation import Installation, until

ENDS_WITHIN_S = 20


class TenantEdge:
    """One region of one tenant, in a block. Nothing of it but its credentials comes from the installation."""

    def __init__(self, tenant: Installation, region: str, folder: Path) -> None:
        self.tenant = tenant
        self.region = region
        self.folder = folder
        self._stack = ExitStack()
        self.port, self._monitor = free_ports(2)
        self.files = nats_config.identity_of(folder / "nats" / region)
        said = tenant.run("fleet", "region", region, "--out", str(self.files))
        assert said.returncode == 0, said.stderr
        accounts = dict(re.findall(r"hub\.accounts\.(\w+): (\w+)", said.stdout + said.stderr))
        # What `trust.conf` names is relative to the server's configuration.
        (folder / TRUST).write_text((self.files / TRUST).read_text())
        (folder / "leaf.conf").write_text(
            nats_config.leaf(
                region,
                self.port,
                leaf_port_of(tenant.home),
                folder / "nats" / region,
                nats_config.Trust(accounts["region"], accounts["system"]),
                self._monitor,
                nats_config.Store("1GB"),
            )
        )

    def __enter__(self) -> Self:
        with ExitStack() as begun:
            begun.callback(self.close)
            self._start("leaf", nats_server(), "-c", str(self.folder / "leaf.conf"))
            tenant, what = self.tenant, f"region {self.region} is not served"
            until(lambda: what not in " ".join(tenant.json("status")["warnings"]), f"{self.region} of {tenant.tenant}")
            begun.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start_agent(self, node: str) -> None:
        """An agent that joins with a token of its tenant."""
        token = self.folder / f"{node}.token"
        made = self.tenant.run("fleet", "token", "create")
        assert made.returncode == 0, made.stderr
        token.write_text(made.stdout.strip())
        config = {
            "node": node,
            "region": self.region,
            "tenant": self.tenant.tenant,
            "nats_url": self.url,
            "data_dir": str(self.folder / node),
            "hidden": [str(self.folder)],
            "join_token_file": str(token),
            "heartbeat_s": 2.0,
            "train_threads": 1,
            "node_config": {"partition-id": 0, "num-partitions": 1},
        }
        (self.folder / f"{node}.json").write_text(json.dumps(config))
        self._start(node, sys.executable, "-m", "fedtide.edge_agent", "--config", str(self.folder / f"{node}.json"))

    def start_release_authority(self) -> None:
        config = self.tenant.home / "tenants" / self.tenant.tenant / "release-authority.json"
        self._start("release-authority", sys.executable, "-m", "fedtide.coordinator.release_authority", str(config))

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def _start(self, name: str, *argv: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FEDTIDE_")}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment)
        self._stack.callback(_end, process)

    def close(self) -> None:
        self._stack.close()


def leaf_port_of(home: Path) -> int:
    """Where regions link to the hub of an embedded installation."""
    found = re.search(r"leafnodes \{ listen: 127\.0\.0\.1:(\d+)", (home / "config" / "hub.conf").read_text())
    assert found is not None
    return int(found[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
