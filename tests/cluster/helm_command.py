"""`helm install` and `helm test`, over Helm as a library: there is no Helm to be installed from the registries.

What was installed is left beside the kubeconfig, as RELEASE.manifest.yaml.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["install", "test"])
    parser.add_argument("release")
    parser.add_argument("chart", nargs="?")
    parser.add_argument("-n", "--namespace", required=True)
    parser.add_argument("--create-namespace", action="store_true")
    parser.add_argument("-f", "--values", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--timeout", default="")
    asked = parser.parse_args()
    config = Path(os.environ["KUBECONFIG"])
    cluster = helm.Config(kubeconfig_content=config.read_text(), namespace=asked.namespace)
    if asked.verb == "test":
        cluster.test(asked.release, timeout=30)
        return 0
    values: dict[str, Any] = {}
    for file in asked.values:
        values = _merged(values, yaml.safe_load(Path(file).read_text()))
    for pair in asked.set:
        values = _merged(values, _nested(*pair.split("=", 1)))
    with helm.Chart.load(asked.chart) as chart:
        cluster.install(
            chart, asked.release, values, create_namespace=asked.create_namespace, wait="hookOnly", timeout=30
        )
        files = chart.render(values, name=asked.release, namespace=asked.namespace)
    texts = [text for path, text in files.items() if not path.endswith("NOTES.txt")]
    found = [body for text in texts for body in yaml.safe_load_all(text) if body]
    (config.parent / f"{asked.release}.manifest.yaml").write_text(yaml.safe_dump_all(found))
    return 0


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **new, **both}


def _nested(path: str, text: str) -> dict[str, Any]:
    value: Any = text[1:-1].split(",") if text.startswith("{") else text
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


if __name__ == "__main__":
    sys.exit(main())
