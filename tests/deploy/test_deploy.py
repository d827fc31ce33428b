"""The files of `deploy/` against one another, and against what is documented."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES_VERSION = "1.31"
METRIC = re.compile(r"\bfastserve_\w+")


def documented_metrics() -> set[str]:
    """Those of the table of `docs/api.md`; of a histogram the series that it has."""
    rows = re.findall(r"^\| `(fastserve_\w+)` \| (\w+) \|", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    histograms = [
        f"{name}_{part}" for name, kind in rows if kind == "histogram" for part in ("bucket", "sum", "count")
    ]
    return {name for name, _ in rows} | set(histograms)


def manifests() -> list[Any]:
    """The objects of the Kubernetes files."""
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    found = [
        each
        for path in files
        if path.name != "kustomization.yaml"
        for each in yaml.safe_load_all(path.read_text())
    ]
    assert len(found) >= 5
    return found


def test_alerts_go_by_metrics_that_there_are() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
    used = {name for rule in rules for name in METRIC.findall(rule["expr"])}
    assert used
    assert used <= documented_metrics()


def test_each_alert_says_what_to_do() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
    guide = (ROOT / "docs/operations.md").read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in guide] == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yaml"],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_what_its_program_writes() -> None:
    program = runpy.run_path(str(DEPLOY / "grafana/dashboard.py"))
    assert (DEPLOY / "grafana/fastserve.json").read_text() == program["build"]()


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    board = json.loads((DEPLOY / "grafana/fastserve.json").read_text())
    shown = {
        name
        for panel in board["panels"]
        for target in panel.get("targets", [])
        for name in METRIC.findall(target["expr"])
    }
    assert len(shown) > 20
    assert shown <= documented_metrics()


def test_manifests_are_as_kubernetes_wants_them() -> None:
    for each in manifests():
        if not each["apiVersion"].startswith("keda.sh"):  # an extension's, which has no schema there
            kubernetes_validate.validate(each, KUBERNETES_VERSION, strict=True)


def test_manifests_agree_with_one_another() -> None:
    objects = {each["kind"]: each for each in manifests()}
    pod = objects["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    for kind, path in (("Service", ("selector",)), ("PodDisruptionBudget", ("selector", "matchLabels"))):
        selector: Any = objects[kind]["spec"]
        for key in path:
            selector = selector[key]
        assert selector.items() <= labels
    [container] = pod["spec"]["containers"]
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} <= names
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    drain = next(each for each in container["args"] if each.startswith("--exit-timeout-secs="))
    assert int(drain.split("=")[1]) < pod["spec"]["terminationGracePeriodSeconds"]
    named = objects["Kustomization"]["resources"] if "Kustomization" in objects else []
    kustomization = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())
    files = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    assert not named


def test_compose_mounts_files_that_there_are() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists(), source
