"""Speed of a fast and a slow worker together, against the sum of what each does alone: `python jobs/uneven.py`.

Both train the digits; their compute is a sleep for each row, so that what is seen is the waiting, whatever this
machine's cores do. Shards are dealt by measured speed: two workers waste nothing if the slow one gets as much less as
it is slower. Rates are those of the second half of the steps, when the shares have settled.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import ray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from distrain import Trainer
from distrain.config import load_config
from distrain.progress import SilentProgress
from distrain.records import Report

SECONDS_A_ROW = 0.0005  # of the fast worker
SHARDS, BATCH_SIZE = 20, 200


class Pace(SilentProgress):
    """When each step was done, and what it did."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, int]] = []  # (Unix seconds, samples)

    def report(self, report: Report) -> None:
        self.steps += [(record.time_ms / 1000, record.samples) for record in report.steps]

    def samples_per_second(self) -> float:
        """Of the second half."""
        half = self.steps[len(self.steps) // 2 :]
        return sum(samples for _, samples in half[1:]) / (half[-1][0] - half[0][0])


def speed(num_workers: int, slower: float, steps: int) -> float:
    """Samples a second of the fast worker (`slower` 1), of one so much slower, or of both, which is two workers."""
    pace = Pace()
    with tempfile.TemporaryDirectory() as folder:
        # Paced takes the process that comes first for the slow one.
        seconds = SECONDS_A_ROW if num_workers == 2 else SECONDS_A_ROW * slower / 4
        model = f"model={{factory: 'jobs.modes:build', args: {{seconds: {seconds}, flag: '{folder}/slow'}}}}"
        config = load_config(
            Path(__file__).parent / "digits.yaml",
            [
                model, "data.standardize=false", "tracking.enabled=false", f"checkpoint.dir={folder}/runs",
                "validation.every_steps=null", f"batch_size={BATCH_SIZE}", f"shards={SHARDS}", "schedule=null",
                f"epochs={steps}", f"max_steps={steps}", f"workers.count={num_workers}",
            ],
        )  # fmt: skip
        Trainer(config, pace).fit()
    return pace.samples_per_second()


@click.command()
@click.option("--steps", default=80, show_default=True)
def main(steps: int) -> None:
    """Measure each alone, then both."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    fast, slow, both = speed(1, 1.0, steps), speed(1, 4.0, steps), speed(2, 4.0, steps)
    ray.shutdown()
    table = Table(title="Samples a second of a worker, of one four times as slow, and of both")
    for column in ("fast alone", "slow alone", "both", "of their sum"):
        table.add_column(column, justify="right")
    table.add_row(f"{fast:,.0f}", f"{slow:,.0f}", f"{both:,.0f}", f"{both / (fast + slow):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
