"""What a step's exchange costs between hosts: distrain, with slices and bfloat16 on the wire, beside DDP over gloo.

    python jobs/hosts_benchmark.py run 10.0.0.1 10.0.0.2 10.0.0.3 --launch "ssh {host} {quoted}"

starts one process a host by the command of `--launch`, in which {host} is an address, {number} its place from 1 on,
{command} what to run there and {quoted} the same as one argument, for what hands it to another shell. Python and this
repository have to be under the same paths everywhere. It needs no Ray. The model's
gradient costs next to nothing to compute, so that the exchange and the update are what is measured; with `--backward`
a backward pass takes longer, asleep, and shows what is sent meanwhile. Every contender
has the same model, optimizer (Adam) and number of workers. Prints a table of milliseconds a step: means, since steps of
different lengths take turns where several are in flight.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import click
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jobs.contenders.core import Exchange, Model, relay, serve  # noqa: E402
from jobs.contenders.preset import build  # noqa: E402
from jobs.contenders.process import prepare_process  # noqa: E402

CONTENDERS = ("distrain", "distrain sliced", "distrain sliced bf16", "distrain sliced bf16 stale", "ddp")
WARMUP_STEPS = 5
TIMEOUT_S = 300.0
TOLD_LINES = 20  # of a host that failed
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Setup:
    """One measurement. `hosts` are addresses; the first one's is where the others connect, at `port`."""

    contender: str  # distrain or ddp
    hosts: tuple[str, ...]
    port: int
    model: Model
    workers: int  # of each host
    steps: int
    exchange: Exchange
    interface: str | None = None  # gloo's

    @property
    def num_workers(self) -> int:
        return self.workers * len(self.hosts)


@click.group()
def cli() -> None:
    pass


@cli.command()
@click.argument("hosts", nargs=-1, required=True)
@click.option("--launch", required=True, help="How a command is run on a host: {host}, {number}, {command}, {quoted}")
@click.option("--floats", multiple=True, type=int, default=(1_000_000, 25_000_000), help="Parameters of the model")
@click.option("--workers", multiple=True, type=int, default=(1, 2), help="Of each host")
@click.option("--backward", "backward_ms", default=0.0, help="Milliseconds of a backward pass")
@click.option("--steps", type=int, default=None, help="Measured; default by the model's size")
@click.option("--port", type=int, default=29_600)
@click.option("--interface", default=None, help="Gloo's network interface")
@click.option("--contender", multiple=True, help="distrain [sliced] [bf16] [stale], or ddp", default=CONTENDERS)
def run(hosts, launch, floats, workers, backward_ms, steps, port, interface, contender) -> None:
    """Measure every contender and print a table."""
    click.echo(f"| {len(hosts)} hosts: parameters | workers a host | " + " | ".join(contender) + " |")
    click.echo("| --- " * (2 + len(contender)) + "|")
    for size in floats:
        for count in workers:
            cells = []
            for name in contender:
                port += 1  # a closed one is not free at once
                kind, *words = name.split()
                exchange = Exchange(
                    len(hosts) if "sliced" in words else 1,
                    "bf16" if "bf16" in words else "fp32",
                    1 if "stale" in words else 0,
                )
                num_steps = steps or max(15, min(200, 100_000_000 // size))
                model = Model(size, backward_seconds=backward_ms / 1000)
                setup = Setup(kind, hosts, port, model, count, num_steps, exchange, interface)
                cells.append(f"{measure(setup, launch):.1f} ms")
            click.echo(f"| {size:,} | {count} | " + " | ".join(cells) + " |")


@dataclass(frozen=True)
class Part:
    """What runs on one host, and the files that it writes to."""

    host: str
    process: subprocess.Popen[str]
    output: TextIO
    errors: TextIO

    def told(self) -> str:
        """Its last words."""
        self.errors.seek(0)
        return f"{self.host} said:\n" + "".join(self.errors.readlines()[-TOLD_LINES:])


def measure(setup: Setup, launch: str) -> float:
    """Run one contender on all hosts. Returns the mean step in milliseconds, as the first host saw it.

    Raises ClickException as soon as a host's process fails, or where they have not all ended after TIMEOUT_S.
    """
    parts = []
    with ExitStack() as files:
        for number, host in enumerate(setup.hosts, 1):
            inner = shlex.join(
                [sys.executable, str(Path(__file__).resolve()), "host", str(number), json.dumps(asdict(setup))]
            )
            line = launch.format(host=host, number=number, command=inner, quoted=shlex.quote(inner))
            output, errors = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            process = subprocess.Popen(line, shell=True, stdout=output, stderr=errors, cwd=ROOT, text=True)
            parts.append(Part(host, process, output, errors))
        try:
            wait_for(parts)
        finally:
            for part in parts:
                part.process.kill()
        parts[0].output.seek(0)
        said = parts[0].output.read()
        if not said.strip():
            raise click.ClickException(f"no result came back from {parts[0].told()}")
        return float(json.loads(said.splitlines()[-1])["ms"])


def wait_for(parts: Sequence[Part]) -> None:
    """Wait until all have ended well, or raise ClickException."""
    until = time.monotonic() + TIMEOUT_S
    while running := [part for part in parts if part.process.poll() != 0]:
        for part in running:
            if part.process.returncode is not None:
                raise click.ClickException(f"exit code {part.process.returncode}: {part.told()}")
        if time.monotonic() > until:
            told = "\n".join(part.told() for part in running)
            raise click.ClickException(f"no end after {TIMEOUT_S:g} s: {told}")
        time.sleep(0.05)


@cli.command()
@click.argument("number", type=int)
@click.argument("setup")
def host(number: int, setup: str) -> None:
    """One host's part (`run` starts it)."""
    values = json.loads(setup)
    model, exchange = Model(**values.pop("model")), Exchange(**values.pop("exchange"))
    read = Setup(**{**values, "hosts": tuple(values["hosts"])}, model=model, exchange=exchange)
    step_ms = ddp_host(read, number) if read.contender == "ddp" else distrain_host(read, number)
    if number == 1:
        click.echo(json.dumps({"ms": step_ms}))


def distrain_host(setup: Setup, number: int) -> float:
    """The server with its workers on the first host, a relay with its own on the others."""
    first = (number - 1) * setup.workers
    ranks = range(first, first + setup.workers)
    if number == 1:
        steps = WARMUP_STEPS + setup.steps
        records = serve(setup.model, setup.num_workers, ranks, steps, setup.exchange, setup.hosts[0], setup.port)
        return 1000 * statistics.fmean(record.step_s for record in records[WARMUP_STEPS:])
    slice_ = number - 2 if number <= setup.exchange.slices else None
    server = (setup.hosts[0], setup.port)
    relay(setup.model, setup.num_workers, ranks, server, setup.exchange, slice_, setup.hosts[number - 1])
    return 0.0


def ddp_host(setup: Setup, number: int) -> float:
    """The ranks of one host."""
    if setup.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = setup.interface
    results = _FORK.SimpleQueue()
    first = (number - 1) * setup.workers
    ranks = [
        _FORK.Process(target=ddp_rank, args=(setup, rank, results)) for rank in range(first, first + setup.workers)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise click.ClickException("a rank failed")  # and would leave no result to wait for
    return results.get() if number == 1 else 0.0


def ddp_rank(setup: Setup, rank: int, results) -> None:
    """One process of DDP; the first gives the mean step."""
    prepare_process(keeps_memory=True)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{setup.hosts[0]}:{setup.port}", rank=rank, world_size=setup.num_workers
    )
    model = DistributedDataParallel(build(**asdict(setup.model)), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    row, times = torch.ones(1, 1), []
    for _ in range(WARMUP_STEPS + setup.steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(model(row).squeeze(-1), torch.ones(1)).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    if rank == 0:
        results.put(1000 * statistics.fmean(times[WARMUP_STEPS:]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    cli()
