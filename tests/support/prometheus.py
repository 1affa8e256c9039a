"""A real Prometheus, where the machine has one."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.heads import free_port
from tests.support.jobs import wait_for

_CONFIG = Path(__file__).parents[2] / "cluster/monitoring/prometheus.yml"


@dataclass(frozen=True)
class Prometheus:
    """Answers at `url`."""

    url: str

    def history(self, expression: str, since: float) -> list[dict[str, Any]]:
        """What an expression was from a time on, as Grafana asks for it: `metric` (labels) and `values` (pairs of time
        and text) of each series. Raises HTTPError where it is no expression."""
        question = urllib.parse.urlencode({"query": expression, "start": since, "end": time.time(), "step": 0.2})
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{question}", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """One that reads `target` (host:port) as docker-compose.yml's reads its nodes, but five times a second."""
    config = yaml.safe_load(_CONFIG.read_text())
    config["global"]["scrape_interval"] = "200ms"
    [job] = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        found = Prometheus(f"http://{address}")
        wait_for(lambda: _is_ready(found.url), 30, "Prometheus")
        yield found
    finally:
        process.terminate()
        process.wait(20)


def _is_ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/-/ready", timeout=2).close()
    except OSError:
        return False
    return True
