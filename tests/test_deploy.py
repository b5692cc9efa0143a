"""The deployment's files agree with each other, with the code and with the metrics that the server registers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import metric_names

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
GRAFANA = DEPLOY / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "strace-llm.json"
METRIC = re.compile(r"\bstrace_llm_\w+")
PROMISED = ["Realised speedup", "Acceptance", "Fallbacks", "Throughput", "Requests", "Time to first", "Inter-token"]


def read_yaml(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def queries() -> Iterator[tuple[str, str]]:
    """The panel's title and the PromQL of every query of the dashboard on disk."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it says."""
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_queried_metric_is_registered() -> None:
    queried = {name for _, query in queries() for name in METRIC.findall(query)}
    assert queried
    assert queried <= metric_names()


@pytest.mark.parametrize("promised", PROMISED)
def test_dashboard_shows_what_is_promised(promised: str) -> None:
    assert any(title.startswith(promised) for title, _ in queries())


def test_dashboard_is_up_to_date_with_its_generator() -> None:
    check = run(sys.executable, GRAFANA / "generate.py", "--check")
    assert check.returncode == 0, check.stderr


def test_dashboard_and_provisioning_name_one_data_source() -> None:
    (source,) = read_yaml(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert {(panel["datasource"]["type"], panel["datasource"]["uid"]) for panel in panels} == {
        (source["type"], source["uid"])
    }


def test_compose_mounts_what_exists_and_publishes_on_loopback() -> None:
    compose = read_yaml(ROOT / "docker-compose.yml")
    assert set(compose["services"]) == {"server", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"], (
                f"{name}: {source}"
            )
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port} beyond this machine"
        if "image" in service and "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name}: {service['image']} is not pinned"


def test_provisioned_folders_are_the_mounted_ones() -> None:
    compose = read_yaml(ROOT / "docker-compose.yml")
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    (provider,) = read_yaml(GRAFANA / "provisioning" / "dashboards" / "strace-llm.yml")["providers"]
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"


def test_services_reach_each_other_by_the_ports_they_listen_on() -> None:
    services = read_yaml(ROOT / "docker-compose.yml")["services"]
    inside = {name: service["ports"][0].split(":")[-1] for name, service in services.items()}
    (scrape,) = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"server:{inside['server']}"]}]
    (source,) = read_yaml(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert source["url"] == f"http://prometheus:{inside['prometheus']}"
    assert f"EXPOSE {inside['server']}\n" in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def test_dockerfile_copies_what_exists_and_is_let_through() -> None:
    """`.dockerignore` starts by excluding everything, so each source needs a line of its own there."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(path == source or path.startswith(f"{source}/") for path in allowed), f"{source} is ignored"
    for path in allowed:
        assert (ROOT / path).exists(), path


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_accepts_configuration_and_queries(tmp_path: Path) -> None:
    checked = run("promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    assert checked.returncode == 0, checked.stderr
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, (_, query) in enumerate(queries())
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    checked = run("promtool", "check", "rules", path)
    assert checked.returncode == 0, checked.stderr
