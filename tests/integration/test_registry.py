"""Releases in a real OCI registry: pushed, verified from there without a coordinator, and refused when altered."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedtide.console import oci
from fedtide.console.embedded.plan import free_ports
from fedtide.fabric.trust.installation import ROOTS
from tests.integration.conftest import bring_up
from tests.integration.installation import Installation, until
from tests.integration.releases import release

pytestmark = pytest.mark.slow  # it needs Debian's docker-registry and the extra `oci`


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = bring_up(tmp_path_factory.mktemp("registry"), "eu", 1)
    yield made
    made.run("down")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, (port,) = tmp_path_factory.mktemp("blobs"), free_ports(1)
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    until(lambda: _answers(f"http://127.0.0.1:{port}/v2/"), "the registry")
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_a_release_is_verified_from_a_registry_by_its_root_alone(
    there: Installation, registry: str, tmp_path: Path
) -> None:
    version = release(there, 2.0)
    name, root = f"{registry}/models/scale:{version}", tmp_path / "roots.json"
    shutil.copyfile(there.home / "trust" / ROOTS, root)
    pushed = there.run("model", "push", f"scale@{version}", name, "--plain-http")
    assert pushed.returncode == 0, pushed.stderr
    verify = ("model", "verify", "--plain-http", "--root", str(root), "--oci")
    verified = there.run(*verify, name)
    assert verified.returncode == 0, verified.stderr
    assert "releases" in verified.stdout

    copy = tmp_path / "copy"
    oci.pull(name, copy, plain_http=True)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    altered = f"{registry}/models/scale:altered"
    oci.push(altered, copy, plain_http=True)
    refused = there.run(*verify, altered)
    assert refused.returncode != 0
    assert "model.onnx" in refused.stderr

    missing = there.run(*verify, f"{registry}/models/scale:none")
    assert missing.returncode != 0
    assert missing.stderr.startswith("fedtide: ")
    assert "an error of fedtide itself" not in missing.stderr
