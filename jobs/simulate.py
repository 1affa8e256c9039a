"""How the exchange grows with the number of workers, on this machine alone: workers whose compute is a sleep.

    python jobs/simulate.py [--compute-ms 100] [--workers 1 --workers 64] [--hosts 8]

Each worker sleeps for `--compute-ms` a step, which takes no core, and then pushes a gradient of `--floats` values in
four tensors, so what a step takes beyond that is exchange, update, and this machine's cores, which all of them share.
`--hosts` spreads them over so many relays, which add the pushes up and talk to the server over TCP, as on as many
hosts. Prints a table of medians.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs.contenders.core import Model, relay, serve

WARMUP_STEPS = 5
_FORK = multiprocessing.get_context("fork")
_IP = "127.0.0.1"


@click.command()
@click.option("--workers", multiple=True, type=int, default=(1, 2, 4, 8, 16, 32, 64))
@click.option("--compute-ms", type=float, default=100.0, help="Of a worker's step")
@click.option("--floats", type=int, default=1_000_000, help="Parameters of the model")
@click.option("--hosts", type=int, default=4, help="Of the second column; 1 leaves it out")
@click.option("--steps", type=int, default=30, help="Measured, after a few to warm up")
def main(workers: tuple[int, ...], compute_ms: float, floats: int, hosts: int, steps: int) -> None:
    """Measure each number of workers and print a table."""
    model = Model(floats, tensors=4, seconds=compute_ms / 1000)  # each costs a backward call in Python
    columns = [1, hosts] if hosts > 1 else [1]
    click.echo(
        "| workers | "
        + " | ".join(f"{n} host{'s' * (n > 1)}: step | beyond compute | of the ideal" for n in columns)
        + " |"
    )
    click.echo("| --- " * (1 + 3 * len(columns)) + "|")
    for count in workers:
        cells = []
        for number in columns:
            if number > count:
                cells += ["", "", ""]
                continue
            step_ms = measure(model, count, number, WARMUP_STEPS + steps)
            cells += [f"{step_ms:.1f} ms", f"{step_ms - compute_ms:.1f} ms", f"{compute_ms / step_ms:.0%}"]
        click.echo(f"| {count} | " + " | ".join(cells) + " |")


def measure(model: Model, num_workers: int, num_hosts: int, steps: int) -> float:
    """The median step in milliseconds, with the workers spread over hosts; the first is the server's."""
    shares = [
        range(host * num_workers // num_hosts, (host + 1) * num_workers // num_hosts) for host in range(num_hosts)
    ]
    with socket.create_server((_IP, 0)) as free:
        port = free.getsockname()[1]
    others = [_FORK.Process(target=relay, args=(model, num_workers, share, (_IP, port))) for share in shares[1:]]
    for process in others:
        process.start()
    try:
        records = serve(model, num_workers, shares[0], steps, ip=_IP, port=port)
    finally:
        for process in others:
            process.join(20)
            process.kill()
    return 1000 * statistics.median(record.step_s for record in records[WARMUP_STEPS:])


if __name__ == "__main__":
    main()
