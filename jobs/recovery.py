"""Seconds that each fault costs, in distrain and in Ray Train: `python jobs/recovery.py`, from this repository.

Both train the digits' MLP with two workers, from Parquet; both write a checkpoint every 100 steps. distrain writes
another one after each epoch, which is 23 steps, and validates then; Ray Train does neither, and restarts from its last
one, as its FailureConfig has it. Some seconds into the run something happens to its processes. Measured are the longest
pause between two steps that follows, and the time from its beginning to the first step that had not been done before.
`--fault` picks some of the faults. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
CHECKPOINT_STEPS = 100
CALM_S = 4.0  # of steps before the fault
WATCH_S = 15.0  # after it, for pauses to show
LOGGED_S = 2.0  # how long after a step at most its line is written
PATIENCE_S = 60.0  # until a run counts as ended
STARTUP_S = 90.0
TIMEOUT_S = 5  # of distrain, for a worker that is silent; Ray Train has none


@dataclass(frozen=True)
class Contender:
    """Who trains, and what its processes are called."""

    name: str
    worker: str
    coordinator: str


CONTENDERS = {
    "distrain": Contender("distrain", "ray::WorkerActor", "ray::ServerActor"),
    "ray-train": Contender("Ray Train", "RayTrainWorker", "TrainController"),
}


class Run:
    """One contender at work in a process of its own, the driver. A step is a line of its log: [Unix seconds, step]."""

    def __init__(self, which: str, folder: Path, num_nodes: int) -> None:
        self.contender, self._which, self._folder, self._num_nodes = CONTENDERS[which], which, folder, num_nodes
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the driver, which goes on where there is something to go on from."""
        with open(self._folder / "said", "ab") as said:
            self.driver = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / "recovery_run.py"), self._which, str(self._folder),
                 str(self._num_nodes), str(CHECKPOINT_STEPS), str(TIMEOUT_S)],
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        return self.driver

    def steps(self) -> list[tuple[float, int]]:
        """Each step done so far."""
        log = self._folder / "steps"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(at, step) for at, step in (json.loads(line) for line in lines if line.endswith("]"))]

    def processes(self, name: str) -> list[psutil.Process]:
        """The driver's descendants of this name, the newest first."""
        found = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if name in " ".join(process.cmdline()):
                        found.append(process)
        return sorted(found, key=lambda process: process.create_time(), reverse=True)

    def close(self) -> None:
        """End it with all it started."""
        guards = self.processes("ray_guard")  # which remove the files of a distrain's Ray
        everything = [process for process in self.processes("") if process not in guards]
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()
        for process in everything:
            with suppress(psutil.Error):
                process.kill()


def send(actor: Callable[[Contender], str], number: int, count: int | None = 1) -> Callable[[Run], None]:
    """Send a signal to the newest `count` processes of an actor; None: to all."""

    def act(run: Run) -> None:
        for process in run.processes(actor(run.contender))[:count]:
            process.send_signal(number)

    return act


def kill_node(run: Run) -> None:
    """Kill a node that has a worker and not the coordinator: its raylet, and all below."""
    for raylet in run.processes("raylet/raylet"):
        below = raylet.children(recursive=True)
        names = [" ".join(process.cmdline()) for process in below]
        if any(run.contender.worker in name for name in names) and not any(
            run.contender.coordinator in name for name in names
        ):
            for process in [raylet, *below]:
                with suppress(psutil.Error):
                    process.kill()
            return
    raise click.ClickException("no node has a worker and not the coordinator")


def kill_driver(run: Run) -> None:
    """Kill the driver and start it again at once."""
    run.driver.kill()
    run.driver.wait()
    run.start()


@dataclass(frozen=True)
class Fault:
    """Something that happens, and on how many Ray nodes (1: a Ray of the run's own)."""

    what: str
    act: Callable[[Run], None]
    num_nodes: int = 1


FAULTS = {
    "worker": Fault("a worker killed", send(lambda c: c.worker, signal.SIGKILL)),
    "hang": Fault("a worker stopped (SIGSTOP)", send(lambda c: c.worker, signal.SIGSTOP)),
    "workers": Fault("all workers killed", send(lambda c: c.worker, signal.SIGKILL, None)),
    "server": Fault(
        "the parameter server killed; Ray Train's controller", send(lambda c: c.coordinator, signal.SIGKILL)
    ),
    "node": Fault("a node killed, another has room", kill_node, num_nodes=3),
    "driver": Fault("the driver killed, started again at once", kill_driver),
}


def cost(steps: Sequence[tuple[float, int]], at: float, now: float) -> tuple[float, float] | None:
    """The longest pause between steps since `at`, seconds, and the seconds from its beginning until a step is done that
    had not been done before it. None where it lasts until `now`, or no such step came."""
    ends = [(when, step) for when, step in steps if when > at]
    begins = [at, *(when for when, _ in ends)]
    pauses = [(when - begin, begin, when) for begin, (when, _) in zip(begins, ends, strict=False)]
    if not pauses or max(pauses)[0] < now - ends[-1][0] - LOGGED_S:
        return None
    seconds, begin, end = max(pauses)
    done = max(step for when, step in steps if when < end)
    new = next((when for when, step in ends if when >= end and step > done), None)
    return None if new is None else (seconds, new - begin)


def measure(which: str, fault: Fault) -> str:
    """Have it happen to a run, and say what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(which, Path(folder), fault.num_nodes)
        try:
            began = time.time()
            while not run.steps():
                if run.driver.poll() is not None or time.time() - began > STARTUP_S:
                    raise click.ClickException(f"{which} did not start:\n{Path(folder, 'said').read_text()[-2000:]}")
                time.sleep(0.1)
            time.sleep(CALM_S)
            at = time.time()
            fault.act(run)
            while time.time() - at < PATIENCE_S and run.driver.poll() is None:
                time.sleep(0.2)
                if time.time() - at > WATCH_S and cost(run.steps(), at, time.time()) is not None:
                    break
            found = cost(run.steps(), at, time.time())
            if found is not None:
                return f"{found[0]:.1f} / {found[1]:.1f}"
            return f"no step in {PATIENCE_S:g} s" if run.driver.poll() is None else "the run ended"
        finally:
            run.close()


@click.command()
@click.option("--fault", "names", multiple=True, type=click.Choice(list(FAULTS)), help="Only this; may be repeated.")
@click.option("--contender", "contenders", multiple=True, type=click.Choice(list(CONTENDERS)), help="Only this.")
def main(names: tuple[str, ...], contenders: tuple[str, ...]) -> None:
    """Have each fault happen to each contender, and say what it cost."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run under way is ended too
    which = contenders or tuple(CONTENDERS)
    table = Table(title="Seconds without a step after the fault / until a new one, two workers on one machine")
    table.add_column("fault")
    for each in which:
        table.add_column(CONTENDERS[each].name, justify="right")
    for name in names or FAULTS:
        cells = []
        for each in which:
            cells.append(measure(each, FAULTS[name]))
            click.echo(f"{FAULTS[name].what}: {CONTENDERS[each].name}: {cells[-1]}", err=True)
        table.add_row(FAULTS[name].what, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
