"""Speed of training while its MLflow server hangs, is dead or is slow: `python jobs/tracking_cost.py`.

Trains the benchmark's first model with two workers on this machine, beside a real MLflow server, which takes its share
of the cores while it lives, even with nothing to do. What happens to the server happens as the first step is done, and
lasts to the end of the run. The goal is less than 5 % of the speed without tracking and without a server.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain import Trainer
from distrain.config import load_config
from distrain.data.synthetic import write_list_rows
from distrain.records import Report
from jobs.benchmark import GUESSED_RATE, MODELS, ensure, job
from jobs.uneven import Pace

GOAL = 0.95
SLOW_S = 1.0  # of a slow server's standing still, again and again


class Server:
    """An MLflow server, as a process group."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
             f"--backend-store-uri=sqlite:///{folder}/server.db", f"--default-artifact-root={folder}/artifacts"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._ended = threading.Event()
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            time.sleep(0.1)
        self.close()
        raise click.ClickException("the MLflow server did not start")

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def slow_down(self) -> None:
        """Have it stand still most of the time."""

        def hold() -> None:
            while not self._ended.wait(0.05):
                self.signal(signal.SIGSTOP)
                self._ended.wait(SLOW_S)
                self.signal(signal.SIGCONT)

        threading.Thread(target=hold, daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        self.signal(signal.SIGKILL)
        self._process.wait()


UNTRACKED = "is not needed: no tracking"
TROUBLES: dict[str, Callable[[Server], None]] = {
    UNTRACKED: lambda server: server.signal(signal.SIGKILL),
    "is well": lambda server: None,
    "hangs": lambda server: server.signal(signal.SIGSTOP),
    "is dead": lambda server: server.signal(signal.SIGKILL),
    f"stands still for {SLOW_S:g} s at a time": Server.slow_down,
}


class Troubled(Pace):
    """Calls `act` as the first step is done."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self._act: Callable[[], None] | None = act

    def report(self, report: Report) -> None:
        super().report(report)
        if self._act is not None and self.steps:
            self._act()
            self._act = None


def speed(name: str, seconds: float) -> float:
    """Samples a second of a run's second half, with this trouble."""
    spec = replace(MODELS["mlp784"], folder=str(Path(MODELS["mlp784"].folder).absolute()))
    steps = int(seconds * GUESSED_RATE["mlp784"] / spec.batch_size / spec.num_workers)
    with tempfile.TemporaryDirectory() as folder, closing(Server(Path(folder))) as server:
        pace = Troubled(lambda: TROUBLES[name](server))
        tracking = f"tracking={{enabled: {str(name != UNTRACKED).lower()}, uri: '{server.uri}'}}"
        Trainer(load_config(job(spec, Path(folder), steps), [tracking]), pace).fit()
    return pace.samples_per_second()


@click.command()
@click.option("--seconds", default=15.0, show_default=True, help="About how long each run trains.")
@click.option("--repeats", default=3, show_default=True)
def main(seconds: float, repeats: int) -> None:
    """Measure each in turn, several times."""
    ensure(Path(MODELS["mlp784"].folder), write_list_rows)
    rates: dict[str, list[float]] = {name: [] for name in TROUBLES}
    for repeat in range(repeats):
        for name in TROUBLES:
            rates[name].append(speed(name, seconds))
            click.echo(f"{repeat + 1}/{repeats} the server {name}: {rates[name][-1]:,.0f} samples/s", err=True)
    table = Table(title="Samples a second while the MLflow server ...")
    for column in ("", "samples/s", "from - to", "of no tracking", f"goal {GOAL:g}"):
        table.add_column(column, justify="right" if column else "left")
    untracked = statistics.median(rates[UNTRACKED])
    for name, values in rates.items():
        middle = statistics.median(values)
        ratio = middle / untracked
        met = "" if name == UNTRACKED else "met" if ratio > GOAL else "missed"
        table.add_row(name, f"{middle:,.0f}", f"{min(values):,.0f} - {max(values):,.0f}", f"{ratio:.2f}", met)
    Console().print(table)


if __name__ == "__main__":
    main()
