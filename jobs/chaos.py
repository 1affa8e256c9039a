"""A job under a stream of faults: does it end with the same weights, and how long does each fault cost?

    python jobs/chaos.py jobs/digits.yaml epochs=300 --every 2 --seed 0

Runs the job undisturbed, then again while workers are killed, hung and paused, the parameter server is killed, and
checkpoints are damaged, at random moments that the seed decides. `--faults` picks some; "node killed" comes only where
it is named, to a node that is not the driver's and not the head. On the cluster of RAY_ADDRESS where that is set (one
on which no other distrain run is under way: its workers would be hit too), else on a Ray of its own. Prints a table,
and exits with 1 unless the weights are the same to the bit and the run's history holds.
"""

from __future__ import annotations

import logging
import os
import random
import statistics
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain import Result, Trainer
from distrain.config import load_config
from distrain.history import check
from distrain.progress import RunInfo, SilentProgress
from distrain.records import Event, Report

PATIENCE_S = 2.0  # workers.timeout_seconds of the disturbed run: a hung worker costs this
RAYLET = "raylet"


@dataclass(frozen=True)
class Fault:
    """A signal to a process of an actor, or to all of them; what was stopped may go on later."""

    actor: str
    signal: str = "SIGKILL"
    to_all: bool = False
    goes_on_after_s: float | None = None
    damages_checkpoint: bool = False  # the latest one, before the signal
    by_default: bool = True


FAULTS = {
    "worker killed": Fault("WorkerActor"),
    "all workers killed": Fault("WorkerActor", to_all=True),
    "worker hung": Fault("WorkerActor", "SIGSTOP"),
    "worker paused until it was given up": Fault("WorkerActor", "SIGSTOP", goes_on_after_s=1.5 * PATIENCE_S),
    "server killed": Fault("ServerActor"),
    "latest checkpoint damaged and server killed": Fault("ServerActor", damages_checkpoint=True),
    "node killed": Fault(RAYLET, by_default=False),
}


@ray.remote(num_cpus=0)
def processes(actor: str) -> list[int]:
    """The processes of distrain's actors of this class on this node, as far as they belong to this cluster; or the
    node's raylet."""
    import psutil

    if actor == RAYLET:
        return [os.getppid()]
    found = []
    for process in psutil.Process().parent().children():  # of the node's raylet, as this task's own
        try:
            if f"ray::{actor}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_STOPPED:
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return sorted(found)


@ray.remote(num_cpus=0, max_retries=0)
def send(pid: int, name: str) -> None:
    """Send a signal to a process of this node."""
    import signal
    from contextlib import suppress

    with suppress(ProcessLookupError):
        os.kill(pid, signal.Signals[name])


def victims_of(fault: Fault) -> list[tuple[NodeAffinitySchedulingStrategy, int]]:
    """The processes that it may happen to, each with where to send its signal from."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if fault.actor == RAYLET:
        own = ray.get_runtime_context().get_node_id()
        nodes = [n for n in nodes if n["NodeID"] != own and "node:__internal_head__" not in n["Resources"]]
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    found = ray.get([processes.options(scheduling_strategy=place).remote(fault.actor) for place in places])
    return [(place, pid) for place, pids in zip(places, found, strict=True) for pid in pids]


def damage(folder: Path) -> None:
    """Flip a bit in the middle of a run's latest checkpoint."""
    for file in sorted(folder.glob("step-*/model.safetensors"))[-1:]:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@dataclass
class Injected:
    """One fault, and what it cost."""

    fault: str
    at: float  # Unix seconds
    recovered_s: float | None = None


@dataclass
class Watch(SilentProgress):
    """Sees the run's steps, its end, and its events."""

    checkpoints: Path  # of all runs
    folder: Path = Path()  # of this run's
    stepped: threading.Event = field(default_factory=threading.Event)  # since it was last cleared
    over: threading.Event = field(default_factory=threading.Event)
    events: list[Event] = field(default_factory=list)

    def started(self, info: RunInfo) -> None:
        self.folder = self.checkpoints / info.run_name
        click.echo(f"{info.run_name}: {info.total_steps:,} steps with {info.num_workers} workers", err=True)

    def report(self, report: Report) -> None:
        self.events += report.events
        if report.steps:
            self.stepped.set()

    def note(self, message: str) -> None:
        click.echo(f"  {message}", err=True)


def inject(watch: Watch, rng: random.Random, every_s: float, wanted: list[str], injected: list[Injected]) -> None:
    """Faults until the run is over, each after the run got on from the one before."""
    while not watch.over.is_set():
        if not watch.stepped.wait(1.0) or watch.over.wait(rng.uniform(0.5, 1.5) * every_s):
            continue
        name = rng.choice(wanted)
        fault = FAULTS[name]
        victims = victims_of(fault)
        if not victims or watch.over.is_set():
            continue
        chosen = victims if fault.to_all else [rng.choice(victims)]
        if fault.damages_checkpoint:
            damage(watch.folder)
        injected.append(Injected(name, time.time()))
        click.echo(f"  {name} ({', '.join(f'process {pid}' for _, pid in chosen)})", err=True)
        signal_all(chosen, fault.signal)
        watch.stepped.clear()
        if fault.goes_on_after_s is not None:
            watch.over.wait(fault.goes_on_after_s)
            signal_all(chosen, "SIGCONT")


def signal_all(chosen: list[tuple[NodeAffinitySchedulingStrategy, int]], name: str) -> None:
    sent = [send.options(scheduling_strategy=place).remote(pid, name) for place, pid in chosen]
    for one in sent:
        with suppress(RayError):  # whoever kills its own node does not answer
            ray.get(one)


def credit(injected: list[Injected], events: list[Event]) -> None:
    """Enter for each fault when the step that it disturbed was whole again."""
    for number, one in enumerate(injected):
        until = injected[number + 1].at if number + 1 < len(injected) else float("inf")
        for event in events:
            if event.kind == "recovered" and one.at <= event.time_ms / 1000 < until:
                one.recovered_s = event.time_ms / 1000 - one.at
                break


def show(injected: list[Injected], calm: Result, disturbed: Result, problems: list[str]) -> None:
    """The table, and what the two runs have in common."""
    table = Table(title=f"{len(injected)} faults in {disturbed.seconds['training']:.0f} s")
    for column in ("fault", "times", "recovered after, median", "at most"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for fault in FAULTS:
        of_kind = [one for one in injected if one.fault == fault]
        seconds = [one.recovered_s for one in of_kind if one.recovered_s is not None]
        if of_kind:
            middle, most = (f"{statistics.median(seconds):.2f} s", f"{max(seconds):.2f} s") if seconds else ("", "")
            table.add_row(fault, str(len(of_kind)), middle, most)
    console = Console(highlight=False)
    console.print(table)
    same = calm.parameters_sha256 == disturbed.parameters_sha256
    console.print(f"weights: {'the same to the bit' if same else 'DIFFERENT'} ({disturbed.parameters_sha256[:16]})")
    console.print(
        f"history: {'; '.join(problems) or 'each shard of each step once, nothing durable lost'}", soft_wrap=True
    )
    slower = disturbed.seconds["training"] / calm.seconds["training"]
    console.print(f"time: {slower:.2f} times that of the undisturbed run ({calm.seconds['training']:.1f} s)")


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("config", type=click.Path(exists=True))
@click.argument("overrides", nargs=-1)
@click.option("--every", default=2.0, show_default=True, help="Seconds between faults, on average.")
@click.option("--seed", default=0, show_default=True)
@click.option("--faults", default=",".join(name for name, fault in FAULTS.items() if fault.by_default),
              show_default=True, help="Which, with commas between them.")  # fmt: skip
def main(config: str, overrides: tuple[str, ...], every: float, seed: int, faults: str) -> None:
    """Run a job undisturbed, and again under faults."""
    wanted = faults.split(",")
    unknown = [fault for fault in wanted if fault not in FAULTS]
    if unknown:
        raise click.UsageError(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    job = load_config(config, ["tracking.enabled=false", "checkpoint.history=true", *overrides])
    address = os.environ.get("RAY_ADDRESS")
    cpus = None if address else max(os.cpu_count() or 1, int(job.workers.count * job.workers.cpus))
    ray.init(
        address=address or "local",
        num_cpus=cpus,
        include_dashboard=None if address else False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )
    calm = Trainer(job, Watch(Path(job.checkpoint.dir))).fit()
    watch, injected = Watch(Path(job.checkpoint.dir)), list[Injected]()
    thread = threading.Thread(target=inject, args=(watch, random.Random(seed), every, wanted, injected), daemon=True)
    thread.start()
    try:
        disturbed = Trainer(load_config(config, [
            "tracking.enabled=false", "checkpoint.history=true", f"workers.timeout_seconds={PATIENCE_S}", *overrides,
        ]), watch).fit()  # fmt: skip
    finally:
        watch.over.set()
        thread.join(30)
    credit(injected, watch.events)
    _, problems = check(Path(job.checkpoint.dir, disturbed.run_name, "history.jsonl"))
    show(injected, calm, disturbed, problems)
    ray.shutdown()
    sys.exit(0 if calm.parameters_sha256 == disturbed.parameters_sha256 and not problems else 1)


if __name__ == "__main__":
    main()
