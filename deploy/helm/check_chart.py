"""Lints and renders the chart, and checks what it renders against Kubernetes' schemas.

Run by deploy/check.sh, with Helm as a library (helm-python-sdk) and the schemas of
kubernetes-validate. Resources of the Prometheus operator have no schema there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

CHART = Path(__file__).parent / "vllm-kvpca"
KUBERNETES = "1.31"
WITHOUT_SCHEMA = ("ServiceMonitor", "PrometheusRule")
MONITORING: dict[str, Any] = {
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True},
    "dashboards": {"enabled": True},
}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "monitored replicas": {
        "replicas": 3,
        "tensorParallelSize": 2,
        "servedModelName": "m",
        "apiKeySecret": "key",
        "huggingFaceTokenSecret": "token",
        "extraArgs": ["--max-model-len=32768"],
        "extraEnv": [{"name": "A", "value": "b"}],
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
        "huggingFaceCache": {"accessModes": ["ReadWriteMany"], "storageClass": "nfs"},
        **MONITORING,
    },
    "several nodes": {"ray": {"workers": 1}, "tensorParallelSize": 8},
    "no GPU, no compression": {
        "gpuResource": "",
        "huggingFaceCache": {"enabled": False},
        "kvCompression": {"preset": ""},
    },
}
REFUSED: tuple[dict[str, Any], ...] = (
    {"replicas": -1},
    {"presets": "k8v4"},
    {"ray": {"workers": 1}, "replicas": 2},
)


def resources(chart: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    """What the chart renders, as documents."""
    chart.validate_schema(values)
    rendered = chart.render(values, name="demo", namespace="prod")
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def check(chart: Any) -> None:
    for name, values in CASES.items():
        kinds = []
        for document in resources(chart, values):
            kinds.append(document["kind"])
            if document["kind"] not in WITHOUT_SCHEMA:
                kubernetes_validate.validate(document, KUBERNETES, strict=True)
        print(f"{name}: {', '.join(kinds)}")
    for values in REFUSED:
        try:
            resources(chart, values)
        except helm_python.HelmError as error:
            print(f"refused: {values}: {str(error).splitlines()[0][:70]}")
        else:
            sys.exit(f"not refused: {values}")


def main() -> None:
    findings = helm_python.lint(str(CHART))
    if findings["errors"]:
        sys.exit(f"helm lint: {findings['errors']}")
    with helm_python.Chart.load(str(CHART)) as chart:
        check(chart)


if __name__ == "__main__":
    main()
