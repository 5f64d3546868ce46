"""Names of regions that YAML or nats-server would read as something else: Norway, and shops with numbers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from fedtide.console.embedded import nats_config
from fedtide.console.embedded.plan import nats_server
from tests.cluster.test_charts import EDGE, render

NAMES = ["no", "on", "0042", "12k", "2-east", "1e3", "null"]


@pytest.mark.parametrize("region", NAMES)
def test_a_server_takes_the_name_as_it_is(tmp_path: Path, region: str) -> None:
    file = tmp_path / "leaf.conf"
    file.write_text(nats_config.leaf(region, 14222, 17422, tmp_path / "store"))
    done = subprocess.run([nats_server(), "-t", "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("region", NAMES)
def test_the_chart_says_the_name_and_nothing_else(tmp_path: Path, region: str) -> None:
    values = {**yaml.safe_load((EDGE / "examples/one-machine.yaml").read_text()), "region": region}
    objects = render(EDGE, values)
    for body in objects:
        assert body["metadata"]["labels"]["fedtide.dev/region"] == region
    (text,) = [b["data"]["nats.conf"] for b in objects if "nats.conf" in b.get("data", {})]
    assert f'domain: "{region}"' in text
