"""distrain beside Ray Train, DDP, and processes that never exchange anything, from Parquet, on this machine.

    pip install -e '.[bench]' && python jobs/benchmark.py

Makes its data under benchmark-data/, runs the contenders in turn, several times, each in processes of its own, and
prints one table; benchmark.json has every figure. `--memory` measures a worker's memory on 1 and 10 million rows
instead.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import psutil
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from distrain.data.synthetic import write_column_rows, write_list_rows  # noqa: E402
from jobs.contenders.spec import Spec  # noqa: E402

DATA = Path("benchmark-data")
MODELS = {
    "mlp784": Spec(str(DATA / "mlp784"), "list", 784, (512, 512), 10, "cross_entropy", 128, 15.0),
    "mlp32": Spec(str(DATA / "mlp32"), "columns", 32, (256, 256), 1, "mse", 1024, 15.0),
}
TITLES = {
    "mlp784": "MLP 784-512-512-10, batch 128 a worker, one list column of 784 floats",
    "mlp32": "MLP 32-256-256-1, batch 1024 a worker, 32 float columns",
}
OURS = {"distrain": [], "distrain_stale": ["server.staleness=1"]}
PEERS = {
    "ray_train": "Ray Train + Ray Data",
    "ddp": "DDP/gloo, hand-written pyarrow streaming",
    "independent": "two processes that never exchange anything",
}
KEPT = "_kept"  # the same with distrain's settings of malloc, so that one sees what these are worth
NAMES = {
    "distrain": "distrain",
    "distrain_stale": "distrain with server.staleness=1",
    **PEERS,
    **{name + KEPT: f"{said}; memory kept as in distrain" for name, said in PEERS.items()},
}
CONTENDERS = (*OURS, *PEERS, *(name + KEPT for name in PEERS))
GOALS = {
    "mlp784": {"ray_train": 4.0, "ddp": 1.4, "independent": 0.7},
    "mlp32": {"ray_train": 3.0, "ddp": 1.3, "independent": 0.75},
}
GUESSED_RATE = {"mlp784": 25_000, "mlp32": 200_000}  # samples/s: how many steps fill the seconds asked for


def ensure(folder: Path, make: Any) -> None:
    """Make a data set unless it is there; a half-made one is not left."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    click.echo(f"making {folder}", err=True)
    make(partial)
    partial.rename(folder)


def job(spec: Spec, folder: Path, max_steps: int) -> Path:
    """The distrain configuration of a measurement."""
    path = folder / "job.yaml"
    values = {
        "data": {"train": spec.folder, "label": spec.label, "shuffle_rows": spec.shuffle_rows,
                 "features": "pixels" if spec.features == "list" else "f*"},
        "model": {"hidden": list(spec.hidden), "outputs": spec.num_outputs},
        "loss": spec.loss,
        "optimizer": {"name": "Adam", "lr": 0.001},
        "batch_size": spec.batch_size * spec.num_workers,
        "epochs": 1_000_000,
        "max_steps": max_steps,
        "workers": {"count": spec.num_workers},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every_steps": None},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    return path


def run_distrain(model: str, spec: Spec, overrides: list[str]) -> float:
    """samples_per_second of the command line's JSON line."""
    steps = max(200, int(spec.seconds * GUESSED_RATE[model] / spec.batch_size / spec.num_workers))
    with tempfile.TemporaryDirectory() as folder:
        path = job(spec, Path(folder), steps)
        command = [sys.executable, "-m", "distrain.cli", "train", str(path), "--json", *overrides]
        return float(json.loads(_output(command).splitlines()[-1])["samples_per_second"])


def run_contender(name: str, spec: Spec) -> float:
    """The rate that a contender's process prints."""
    spec = replace(spec, keeps_memory=name.endswith(KEPT))
    module = f"jobs.contenders.{name.removesuffix(KEPT)}"
    return float(_output([sys.executable, "-m", module, spec.to_json()]).splitlines()[-1])


def _output(command: list[str]) -> str:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _running(command, stdout=out, stderr=err) as process:
            process.wait()
        out.seek(0)
        err.seek(0)
        if process.returncode:
            said = err.read().decode(errors="replace")[-3000:]
            raise click.ClickException(f"{' '.join(command[:3])} failed:\n{said}")
        return out.read().decode()


@contextmanager
def _running(command: list[str], **files: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own. Left early (Ctrl-C), it is asked to end, and what it started goes with it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TRAIN_V2_ENABLED": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **files)
    try:
        yield process
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes], grace_s: float = 20.0) -> None:
    """Interrupt, wait, then kill the process and what is left of its descendants."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        family = []
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=3)
    for child in alive:  # by process object: psutil checks that the id was not reused
        try:
            child.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(alive, timeout=3)


def compare(models: list[str], only: list[str], seconds: float, repeats: int) -> dict[str, Any]:
    """Every contender in turn, `repeats` times over."""
    rates: dict[str, Any] = {model: {name: [] for name in only} for model in models}
    for model in models:
        ensure(Path(MODELS[model].folder), write_list_rows if model == "mlp784" else write_column_rows)
        spec = replace(MODELS[model], seconds=seconds, folder=str(Path(MODELS[model].folder).absolute()))
        for repeat in range(repeats):
            for name in only:
                rate = run_distrain(model, spec, OURS[name]) if name in OURS else run_contender(name, spec)
                rates[model][name].append(rate)
                click.echo(f"{model} {repeat + 1}/{repeats} {NAMES[name]}: {rate:,.0f} samples/s", err=True)
    return rates


def show(rates: dict[str, Any]) -> None:
    """One table: medians, and how often distrain is that fast."""
    console = Console()
    for model, of_model in rates.items():
        table = Table(title=TITLES[model])
        for column in ("", "samples/s", "from - to", "distrain is", "goal", ""):
            table.add_column(column, justify="left" if not column else "right")
        ours = of_model.get("distrain")
        for name, values in of_model.items():
            middle = statistics.median(values)
            ratio = statistics.median(ours) / middle if ours and name != "distrain" else None
            goal = GOALS[model].get(name)
            said = "" if ratio is None or goal is None else "met" if ratio >= goal else "missed"
            table.add_row(
                NAMES[name],
                f"{middle:,.0f}",
                f"{min(values):,.0f} - {max(values):,.0f}",
                "" if ratio is None else f"{ratio:.2f} x",
                "" if goal is None else f"{goal:g} x",
                said,
            )
        console.print(table)


def measure_memory(seconds: float) -> dict[str, int]:
    """A worker's peak resident memory on 1 and on 10 million rows: two passes over the one, one over the other."""
    peaks = {}
    for rows, passes in ((1_000_000, 2), (10_000_000, 1)):
        folder = DATA / f"memory-{rows}"
        ensure(folder, lambda partial, rows=rows: write_column_rows(partial, rows, num_files=2))
        spec = replace(MODELS["mlp32"], folder=str(folder.absolute()), seconds=seconds)
        num_steps = passes * -(-rows // (spec.batch_size * spec.num_workers)) + 100
        peaks[rows] = peak_of_worker(spec, num_steps)
        click.echo(f"{rows:,} rows: {peaks[rows] / 2**20:,.1f} MiB", err=True)
    ratio = peaks[10_000_000] / peaks[1_000_000]
    click.echo(f"peak memory of a worker: 10 million rows take {ratio:.3f} of what 1 million take (goal: at most 1.10)")
    return {str(rows): peak for rows, peak in peaks.items()}


def peak_of_worker(spec: Spec, num_steps: int) -> int:
    """The largest resident size (bytes) of any worker process during a run, in which every row is read."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as err:
        command = [sys.executable, "-m", "distrain.cli", "train", str(job(spec, Path(folder), num_steps)), "--json"]
        peak = 0
        with _running(command, stdout=subprocess.DEVNULL, stderr=err) as process:
            while process.poll() is None:
                peak = max([peak, *_worker_sizes(process.pid)])
                time.sleep(0.1)
        err.seek(0)
        if process.returncode:
            raise click.ClickException(f"the run failed:\n{err.read().decode(errors='replace')[-2000:]}")
    if not peak:
        raise click.ClickException("the run had no worker process to measure")
    return peak


def _worker_sizes(pid: int) -> list[int]:
    sizes = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            if "WorkerActor" in " ".join(child.cmdline()):
                sizes.append(child.memory_info().rss)
    except psutil.Error:
        pass
    return sizes


@click.command()
@click.option("--model", type=click.Choice([*MODELS, "all"]), default="all", show_default=True)
@click.option("--only", default=",".join(CONTENDERS), show_default=True, help="Contenders, with commas between them.")
@click.option("--seconds", default=15.0, show_default=True, help="How long each is measured.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--memory", is_flag=True, help="Measure a worker's memory instead.")
def main(model: str, only: str, seconds: float, repeats: int, memory: bool) -> None:
    """Measure distrain beside its peers on this machine."""
    if memory:
        Path("benchmark-memory.json").write_text(json.dumps(measure_memory(seconds), indent=1))
        return
    names = only.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise click.UsageError(f"no contender {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    rates = compare(list(MODELS) if model == "all" else [model], names, seconds, repeats)
    Path("benchmark.json").write_text(json.dumps(rates, indent=1))
    show(rates)


if __name__ == "__main__":
    main()
