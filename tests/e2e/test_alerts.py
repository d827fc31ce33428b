"""A real Prometheus watches a real server: each alert fires on its fault, and none without one.

Prometheus' times are scaled: a minute of `alerts.yaml` is a second here.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.conftest import Launch, RunningServer, free_ports
from tests.e2e.test_replicas import workers

from fastserve_client import Client, FastServeError

DEPLOY = Path(__file__).parents[2] / "deploy"
SECONDS = {"s": 1, "m": 60, "h": 3600}
FIRING = 'ALERTS{alertstate="firing"}'
LONG: dict[str, Any] = {"max_tokens": 2400, "ignore_eos": True}

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
    pytest.mark.timeout(600),
]


def scaled(text: str) -> str:
    """PromQL or a duration, with every duration a sixtieth."""
    return re.sub(
        r"(?<![\w.])(\d+)([smh])\b", lambda found: f"{int(found[1]) * SECONDS[found[2]] * 1000 // 60}ms", text
    )


class Prometheus:
    """A server that scrapes one target twice a second."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[Any]:
        """The instant vector; empty where Prometheus does not answer yet."""
        query = urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=5) as answer:
                return list(json.load(answer)["data"]["result"])
        except urllib.error.URLError:
            return []

    def firing(self) -> set[str]:
        """The alerts that fire now."""
        return {each["metric"]["alertname"] for each in self.query(FIRING)}

    def ever_fired(self) -> set[str]:
        """Those that have fired since Prometheus was started."""
        return {each["metric"]["alertname"] for each in self.query(f"last_over_time({FIRING}[1h])")}

    def wait_for(self, alerts: set[str], seconds: float) -> None:
        """Until each of them has fired. Fails after `seconds`."""
        give_up = time.monotonic() + seconds
        while missing := alerts - self.ever_fired():
            assert time.monotonic() < give_up, f"have not fired: {missing}"
            time.sleep(0.2)


@contextlib.contextmanager
def prometheus(directory: Path, metrics_url: str) -> Iterator[Prometheus]:
    """Prometheus with the scaled rules, on a free port."""
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = scaled(rule["expr"])
        if "for" in rule:
            rule["for"] = scaled(rule["for"])
    (directory / "alerts.yaml").write_text(yaml.safe_dump(rules))
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "500ms"},
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [{"job_name": "fastserve", "static_configs": [{"targets": [metrics_url]}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = [
        "prometheus",
        f"--config.file={directory / 'prometheus.yml'}",
        f"--web.listen-address={address}",
    ]
    command.append(f"--storage.tsdb.path={directory / 'data'}")
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        watching = Prometheus(f"http://{address}")
        give_up = time.monotonic() + 60.0
        while not watching.query("up == 1"):
            assert time.monotonic() < give_up, (directory / "log").read_text()
            time.sleep(0.1)
        yield watching
    finally:
        process.terminate()
        process.wait(30)


def dashboard_queries() -> list[str]:
    """Those of the dashboard's panels, with its variables filled in."""
    board = json.loads((DEPLOY / "grafana/fastserve.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return [each.replace("$instance", ".*").replace("$__rate_interval", "1m") for each in expressions]


def in_background(work: Callable[[], Any], count: int) -> list[threading.Thread]:
    """Calls in as many threads, whose failures are what the test is about."""

    def call() -> None:
        with contextlib.suppress(FastServeError):
            work()

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_no_alert_fires_while_all_is_well(server: RunningServer, tmp_path: Path, soak: bool) -> None:
    """A quiet hour at the scale of the rules; without `--soak` three minutes."""
    with prometheus(tmp_path, server.metrics_url) as watching, Client(server.grpc_url) as client:
        end = time.monotonic() + (60.0 if soak else 3.0)
        while time.monotonic() < end:
            client.generate("Hello", max_tokens=8, timeout=30.0)
        assert watching.query("fastserve_replicas_ready")
        assert watching.ever_fired() == set()


def test_each_alert_fires_on_its_fault(launch: Launch, tmp_path: Path, soak: bool) -> None:
    if not soak:
        pytest.skip("two minutes: run with --soak")
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
    settings = {"replicas": 2, "max_num_seqs": 3, "max_queue_size": 6, "swap_space_bytes": 0}
    quotas = {"free": {"requests_per_second": 0.01, "burst_seconds": 1}}
    cache = 3400 * 23040  # of each replica: tokens of no two of the long requests
    with (
        launch(**settings, kv_cache_bytes=cache, tenant_quotas=quotas, speculative_method="none") as server,
        prometheus(tmp_path, server.metrics_url) as watching,
        Client(server.grpc_url, retries=0) as client,
    ):
        long = partial(client.generate, "Hello", **LONG)
        threads = in_background(partial(long, timeout=300.0), 6)
        server.wait_for_metrics(lambda found: found["fastserve_requests_running"] == 6, 60.0)
        threads += in_background(partial(long, timeout=300.0), 4)
        threads += in_background(partial(long, timeout=5.0), 2)
        watching.wait_for({"FastServeQueueFull", "FastServeKVCacheFull"}, 60.0)
        for place in range(4):  # they take the places of long ones, and their blocks
            prompt = f"{place} " * 600
            urgent = partial(client.generate, prompt, max_tokens=8, priority=10, timeout=60.0)
            threads += in_background(urgent, 1)
        watching.wait_for({"FastServeTimeouts", "FastServeSlowFirstToken", "FastServeRecomputes"}, 120.0)
        watching.wait_for({"FastServeLongQueueWait"}, 120.0)
        for _ in range(2):  # one more than the tenant's quota
            in_background(partial(client.generate, "Hi", tenant="free", max_tokens=1), 1)[0].join()
        give_up = time.monotonic() + 10.0
        while empty := [query for query in dashboard_queries() if not watching.query(query)]:
            assert time.monotonic() < give_up, empty
        workers(server)[0].kill()
        watching.wait_for({"FastServeReplicaMissing", "FastServeWorkerRestarted", "FastServeErrors"}, 60.0)
        for worker in workers(server):
            worker.kill()
        watching.wait_for({"FastServeNoReplica"}, 60.0)
        for thread in threads:
            thread.join()
        server.launcher.stop()
        watching.wait_for({rule["alert"] for rule in rules}, 60.0)
