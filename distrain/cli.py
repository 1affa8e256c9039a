"""The command line: parse, call, print."""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distrain import __version__
from distrain.errors import ConfigError, DistrainError
from distrain.jsonable import jsonable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.config import OptimizerConfig, ScheduleConfig, TrainConfig
    from distrain.jobs import Jobs
    from distrain.study.record import Study
    from distrain.trainer import Trainer

_BEGAN = time.time()

# Imports of what a verb needs stand inside it: --help and config must not wait for torch, Ray and MLflow.

_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[key=value ...]")
_BATCH_SIZE = click.option("--batch-size", type=click.IntRange(min=1), help="Rows at a time (default: the run's).")
_ADDRESS = click.option("--address", help="The cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else "
                        "http://127.0.0.1:8265).")  # fmt: skip
_ROOT = click.option("--root", default="checkpoints", show_default=True, envvar="DISTRAIN_CHECKPOINT_DIR",
                     help="Folder of all runs' checkpoints, and of sweeps.")  # fmt: skip
_TRACKING_URI = click.option("--tracking-uri", default="sqlite:///mlflow.db", show_default=True,
                             envvar="MLFLOW_TRACKING_URI", help="The tracking store.")  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, last, on standard output.")


class _Verbs(click.Group):
    """Turns our errors into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DistrainError as error:
            from distrain.progress.stream import lasting

            for line in error.message.splitlines() if isinstance(error, ConfigError) else [error.message]:
                print(f"error: {line}", file=lasting(sys.stderr))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except BrokenPipeError:
            raise  # click's to end: who reads the output wants no more of it
        except Exception:
            traceback.print_exc()
            ctx.exit(1)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distrain")
def main() -> None:
    """Train PyTorch models data-parallel, straight from Parquet, on any Ray cluster.

    \b
    distrain plan jobs/digits.yaml                    what a run would be
    distrain train jobs/digits.yaml workers.count=4   run it
    distrain ui jobs/digits.yaml                      browse it in MLflow
    """


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option("--folder", type=click.Path(path_type=Path), help="Where relative paths in CONFIG begin (default: here).")
@_JSON
def train(config: Path, overrides: tuple[str, ...], folder: Path | None, as_json: bool) -> None:
    """Train as the YAML file CONFIG says.

    Any key can be overridden: distrain train jobs/digits.yaml batch_size=128 optimizer.lr=1e-3

    Starts a Ray of its own unless RAY_ADDRESS or cluster.address names a cluster. Ctrl-C finishes the step and writes
    a checkpoint to resume from.
    """
    loaded = _load(config, overrides)
    if folder is not None:
        loaded = loaded.in_folder(folder.absolute())
    if loaded.restarts is not None:
        from distrain.progress import SweepLines, make_progress
        from distrain.study.restarts import train_restarts

        best = train_restarts(loaded, SweepLines())
        make_progress().finished(best)
        _print_result(best, as_json)
        return
    from distrain.progress import make_progress
    from distrain.trainer import Trainer

    _fit(Trainer(loaded, make_progress(), began=_BEGAN), as_json)


@main.command()
@click.argument("run", metavar="RUN|CHECKPOINT")
@_OVERRIDES
@_ROOT
@click.option("--anyway", is_flag=True, help="Go on although the data or what decides the weights has changed.")
@_JSON
def resume(run: str, overrides: tuple[str, ...], root: str, anyway: bool, as_json: bool) -> None:
    """Go on with a run where its last good checkpoint left it, in the same MLflow run.

    RUN is a run's name, its checkpoints' folder or its MLflow run id; CHECKPOINT is one checkpoint's folder. What
    does not decide the weights may change: distrain resume RUN workers.count=8 epochs=20
    """
    from distrain.progress import make_progress
    from distrain.trainer import Trainer

    _fit(Trainer.resume(run, overrides, make_progress(), root, _BEGAN, anyway), as_json)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option("--workers", multiple=True, type=click.IntRange(min=1), help="Predict the speed of so many; may be given "
              "again. Needs --sweep.")  # fmt: skip
@click.option("--sweep", help="The sweep whose measurements to predict from: its name, folder or MLflow id.")
@_JSON
def plan(config: Path, overrides: tuple[str, ...], workers: tuple[int, ...], sweep: str | None, as_json: bool) -> None:
    """Say what a run would be, before anything starts: rows, shards, steps, memory, resources.

    With a sweep that was run, also how fast other worker counts would be: distrain plan job.yaml --sweep NAME
    --workers 16 --workers 64
    """
    if (sweep is None) != (not workers):
        raise click.UsageError("--workers and --sweep go together: the prediction needs measurements")
    loaded = _load(config, overrides)
    from distrain.planning import preview
    from distrain.progress import show_forecasts, show_plan

    found = preview(loaded)
    forecasts = []
    if sweep is not None:
        from distrain.study.forecast import forecast
        from distrain.study.report import find

        study, _ = find(sweep, loaded.checkpoint.dir, loaded.tracking.uri)
        forecasts = forecast(study.points, workers, found.batch_size, loaded.shards, found.steps_per_epoch)
    if as_json:
        predicted = {"forecasts": [asdict(each) for each in forecasts]} if forecasts else {}
        _print_json({**found.to_json(), **predicted})
        return
    show_plan(found)
    if forecasts:
        click.echo("\nPredicted from the sweep, where each worker has its cores to itself:")
        show_forecasts(forecasts)


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@_OVERRIDES
@click.option("--schema", is_flag=True, help="Print the JSON schema of the configuration instead.")
def config(config: Path | None, overrides: tuple[str, ...], schema: bool) -> None:
    """Print the resolved configuration: every key, with defaults and overrides applied."""
    if schema:
        from distrain.config import TrainConfig

        click.echo(json.dumps(TrainConfig.model_json_schema(), indent=2))
    elif config is None:
        raise click.UsageError("give a configuration, or --schema")
    else:
        click.echo(_load(config, overrides).to_yaml(), nl=False)


@main.command()
@click.argument("checkpoint", metavar="RUN|CHECKPOINT")
@click.argument("data", required=False)
@_BATCH_SIZE
@_ROOT
@_JSON
def evaluate(checkpoint: str, data: str | None, batch_size: int | None, root: str, as_json: bool) -> None:
    """Measure a checkpoint's model on Parquet DATA (default: the run's validation rows).

    distrain evaluate checkpoints/my-run/best held-out/
    """
    from distrain.inference import evaluate as measure

    metrics = measure(checkpoint, data, batch_size, root)
    if as_json:
        _print_json(metrics)
    else:
        for name, value in metrics.items():
            click.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")


@main.command()
@click.argument("checkpoint", metavar="RUN|CHECKPOINT")
@click.argument("data")
@click.option("--output", "-o", required=True, help="A .parquet file, or a folder for one file for each of DATA.")
@click.option("--keep", default="", help="Columns of DATA to copy beside the predictions: id,name")
@click.option("--probabilities", is_flag=True, help="Write each class's probability too.")
@_BATCH_SIZE
@_ROOT
def predict(
    checkpoint: str, data: str, output: str, keep: str, probabilities: bool, batch_size: int | None, root: str
) -> None:
    """Predict for each row of Parquet DATA with a checkpoint's model, in order.

    distrain predict checkpoints/my-run/best new-rows/ --output predictions.parquet --keep id
    """
    from distrain.inference import predict as infer

    columns = [name for name in keep.split(",") if name]
    for path in infer(checkpoint, data, output, columns, probabilities, batch_size, root):
        click.echo(path)


@main.command()
@click.argument("folder", default="checkpoints", envvar="DISTRAIN_CHECKPOINT_DIR")
@click.option("--prune", "keep", type=click.IntRange(min=1), metavar="N", help="Keep only the last N and the best.")
@_JSON
def checkpoints(folder: str, keep: int | None, as_json: bool) -> None:
    """List and verify the checkpoints in FOLDER (or s3://bucket/prefix), of one run or of all.

    Exit code 1 where one of them is damaged. With --prune FOLDER has to be a run's.
    """
    from distrain.checkpoint import prune, survey
    from distrain.progress import show_checkpoints

    if keep is not None:
        for path in prune(folder, keep):
            click.echo(f"removed {path}", err=True)
    listed = survey(folder)
    if as_json:
        _print_json([entry.to_json() for entry in listed])
    else:
        show_checkpoints(listed)
    if any(entry.problem is not None for entry in listed):
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option("--grid", "grid", multiple=True, metavar="KEY=VALUE,VALUE", help="A key and its values; give it again "
              "for further keys. Default: the configuration's sweep.grid.")  # fmt: skip
@click.option("--target", metavar="METRIC=VALUE", help="Stop each point at this: validation.accuracy=0.97.")
@click.option("--scale-lr", type=click.Choice(["linear", "sqrt", "none"]), help="How the rate follows batch_size.")
@click.option("--name", help="The sweep's folder in checkpoint.dir; one that is there is gone on with.")
@click.option("--parallel", "num_parallel", type=click.IntRange(min=1), help="Points at a time (default: as many as "
              "the cluster has cores for).")  # fmt: skip
@_JSON
def sweep(
    config: Path,
    overrides: tuple[str, ...],
    grid: tuple[str, ...],
    target: str | None,
    scale_lr: str | None,
    name: str | None,
    num_parallel: int | None,
    as_json: bool,
) -> None:
    """Run CONFIG at every point of a grid, and say which batch size and how many workers pay.

    distrain sweep jobs/digits.yaml --grid batch_size=64,256,1024 --grid workers.count=1,2 --target
    validation.accuracy=0.97
    """
    from distrain.config_file import setting
    from distrain.study.grid import parse_grid, parse_target

    if grid:
        overrides += (setting("sweep.grid", parse_grid(grid)),)
    if target is not None:
        overrides += (parse_target(target),)
    if scale_lr is not None:
        overrides += (f"sweep.scale_lr={scale_lr}",)
    loaded = _load(config, overrides)
    from distrain.progress import SweepLines
    from distrain.study.sweep import Sweep

    running = Sweep(loaded, name, SweepLines(), num_parallel)
    study, report = running.run()
    if as_json:
        _print_json(study.to_mapping())
    else:
        _print_study(study, report.words, running.folder)


@main.command()
@click.argument("sweep", metavar="SWEEP")
@_ROOT
@_TRACKING_URI
@click.option("--output", "-o", type=click.Path(path_type=Path), help="The HTML file (default: report.html in SWEEP).")
def report(sweep: str, root: str, tracking_uri: str, output: Path | None) -> None:
    """Report on SWEEP: table, figures and recommendation, as one HTML file.

    SWEEP is a sweep's name, its folder, or the MLflow id of its parent run.
    """
    from distrain.study.report import build, find

    study, folder = find(sweep, root, tracking_uri)
    path = output or (folder or Path()) / "report.html"
    report = build(study)
    try:
        path.write_text(report.html)
    except OSError as error:
        raise ConfigError(f"{path}: the report cannot be written: {error.strerror}") from error
    _print_study(study, report.words, path.parent, path)


@main.command("check-gradients")
@click.argument("config", type=click.Path(path_type=Path))
@_OVERRIDES
@_JSON
def check_gradients(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Compare the gradient of CONFIG's model and loss, on real rows, with forward mode and with central differences.

    Exit code 1 where a parameter's gradient is wrong.
    """
    loaded = _load(config, overrides)
    from distrain.progress import show_gradients
    from distrain.study.gradient_check import WRONG
    from distrain.study.gradient_check import check_gradients as check

    found = check(loaded)
    if as_json:
        _print_json({"parameters": [each.to_json() for each in found]})
    else:
        show_gradients(found)
    if any(each.verdict == WRONG for each in found):
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option("--backward", is_flag=True, help="Draw the backward pass too.")
@click.option("--output", "-o", default="graph.png", show_default=True, type=click.Path(path_type=Path),
              help="The picture: .png, .svg or .pdf.")  # fmt: skip
@click.option("--run", "run_id", help="Store it in this MLflow run too, by its id.")
@_JSON
def graph(
    config: Path, overrides: tuple[str, ...], backward: bool, output: Path, run_id: str | None, as_json: bool
) -> None:
    """Draw the computational graph of CONFIG's model and loss, with the shapes of a first microbatch."""
    loaded = _load(config, overrides)
    from distrain.study.graph_figure import draw
    from distrain.study.job_graph import job_graph

    found = job_graph(loaded, backward)
    figure = draw(found, f"{config.name}: a microbatch, forward{' and backward' if backward else ''}")
    _save_figure(figure, output)
    if run_id is not None:
        from distrain.tracking.pictures import log_figure

        log_figure(loaded.tracking.uri, run_id, f"graph{output.suffix}", figure)
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(output)


@main.command()
@click.argument("run", metavar="RUN|CHECKPOINT")
@click.argument("data", required=False)
@click.option("--rows", default=1000, show_default=True, type=click.IntRange(min=1), help="Rows of the sample.")
@click.option("--points", default=25, show_default=True, type=click.IntRange(min=3, max=400), help="Along each axis.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of sample and directions.")
@click.option("--output", "-o", default="landscape.png", show_default=True, type=click.Path(path_type=Path),
              help="The picture: .png, .svg or .pdf.")  # fmt: skip
@_ROOT
@_JSON
def landscape(
    run: str, data: str | None, rows: int, points: int, seed: int, output: Path, root: str, as_json: bool
) -> None:
    """Draw the loss around RUN: over the plane of its checkpoints with its path, and over two random directions.

    The loss is that of a sample of Parquet DATA (default: the run's validation rows). The picture goes to a file, and
    into the run in MLflow. More checkpoints give a finer path: checkpoint.every_steps, checkpoint.keep.
    """
    from distrain.study.landscape import landscape as measure
    from distrain.study.landscape_figure import draw

    found = measure(run, root, data, rows, points, seed)
    figure = draw(found)
    _save_figure(figure, output)
    if found.path is None:
        click.echo(f"{found.run_name} kept too few checkpoints for a plane: checkpoint.keep, .every_steps", err=True)
    if found.mlflow_run_id is not None:
        from distrain.errors import TrackingError
        from distrain.tracking.pictures import log_figure

        try:
            log_figure(found.tracking_uri, found.mlflow_run_id, f"landscape{output.suffix}", figure)
        except TrackingError as error:
            click.echo(error.message, err=True)
    if as_json:
        _print_json(found.to_json())
    else:
        click.echo(output)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@_TRACKING_URI
@click.option("--experiment", default="distrain", show_default=True, help="Where RUN is a name.")
def compare(runs: tuple[str, ...], tracking_uri: str, experiment: str) -> None:
    """Print runs side by side: what they were given and differ in, and what came of it.

    RUN is a run's name, its checkpoints' folder, one of these or its MLflow id; a sweep's parent run stands for all of
    its points.
    """
    from distrain.progress import show_comparison
    from distrain.tracking import compare_runs

    show_comparison(compare_runs(tracking_uri, experiment, runs))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_OVERRIDES
@click.option("--name", help="The run's name: a job of it that is submitted again goes on where the last one ended.")
@click.option("--no-wait", is_flag=True, help="Print the job's id and leave it at that.")
@_ADDRESS
def submit(config: Path, overrides: tuple[str, ...], name: str | None, no_wait: bool, address: str | None) -> None:
    """Train as a job on a Ray cluster, and follow it. Ends with the job's own exit code.

    The current folder travels along (without Parquet files and checkpoints), so that CONFIG and your modules are there.
    A name that a job trains under is refused.
    """
    if name is not None:
        from distrain.config_file import setting

        overrides += (setting("tracking.run_name", name), "resume=auto")
    loaded = _load(config, overrides)  # what is wrong with it is better said here than by the job
    from distrain.jobs import Jobs

    jobs = Jobs(address)
    run = loaded.tracking.run_name if loaded.resume == "auto" or loaded.restarts is not None else None
    if run is not None and "dir" in loaded.checkpoint.model_fields_set:  # else where the cluster says
        run = f"{loaded.checkpoint.dir}/{run}"
    job_id = jobs.submit(config, overrides, run)
    if no_wait:
        click.echo(job_id)
        return
    click.echo(f"job {job_id}; stop it with: distrain stop {job_id}", err=True)
    _follow(jobs, job_id)


@main.command()
@click.argument("job", metavar="JOB")
@_ADDRESS
def status(job: str, address: str | None) -> None:
    """Say how a submitted JOB stands."""
    from distrain.jobs import Jobs

    state = Jobs(address).state(job)
    ended = f", exit code {state.exit_code}" if state.exit_code is not None else ""
    click.echo(f"{state.status}{ended}{': ' + state.message if state.message else ''}")


@main.command()
@click.argument("job", metavar="JOB")
@click.option("--follow", "-f", is_flag=True, help="Go on to the job's end, and end with its exit code.")
@_ADDRESS
def logs(job: str, follow: bool, address: str | None) -> None:
    """Print what a submitted JOB has said."""
    from distrain.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        _follow(jobs, job)
    else:
        click.echo(jobs.logs(job), nl=False)


@main.command()
@click.argument("job", metavar="JOB")
@_ADDRESS
def stop(job: str, address: str | None) -> None:
    """Stop a submitted JOB: it finishes its step and writes a checkpoint first.

    Waits for its end, and prints how it ended. Ctrl-C ends the waiting, and the job none the less.
    """
    from distrain.jobs import Jobs

    jobs = Jobs(address)
    if not jobs.stop(job):
        click.echo("had ended already")
        return
    click.echo("stopping: it finishes its step and writes a checkpoint", err=True)
    click.echo(jobs.wait_until_stopped(job).status.lower())


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@_OVERRIDES
@_ADDRESS
@_JSON
def doctor(config: Path | None, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Look at what a run needs, and say what to do where something is wrong.

    Versions, cluster, token, shared memory, tracking, checkpoints, and with CONFIG its data and model. Looks at the
    cluster that jobs are submitted to where --address or RAY_API_SERVER_ADDRESS names it, else at the one that distrain
    train uses.
    Exit code 0, or that of the first thing that failed, as distrain train would end with it.
    """
    loaded = None if config is None else _load(config, overrides)
    from distrain.doctor import examine
    from distrain.progress import show_finding

    findings = []
    for finding in examine(loaded, address):
        findings.append(finding)
        if not as_json:
            show_finding(finding)
    if as_json:
        _print_json({"findings": [finding.to_json() for finding in findings]})
    raise click.exceptions.Exit(next((finding.exit_code for finding in findings if finding.exit_code), 0))


@main.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=5000, show_default=True)
def ui(config: Path | None, host: str, port: int) -> None:
    """Open MLflow's page on the store that CONFIG logs to (default: mlflow.db here)."""
    from distrain.config import TrackingConfig
    from distrain.tracking import open_ui

    uri = (TrackingConfig() if config is None else _load(config, ()).tracking).uri
    open_ui(uri, host, port)


def _follow(jobs: Jobs, job_id: str) -> None:
    """Print a job's log to its end, and exit with its code."""
    from distrain.jobs import exit_code, failure

    state = jobs.follow(job_id, partial(click.echo, nl=False), partial(click.echo, err=True))
    if (why := failure(state)) is not None:
        click.echo(f"error: job {job_id} failed: {why}; more is in: distrain status {job_id}", err=True)
    raise click.exceptions.Exit(exit_code(state))


def _save_figure(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: the picture cannot be written: {error}") from error


def _print_study(study: Study, words: list[str], folder: Path, path: Path | None = None) -> None:
    from distrain.progress import show_points

    show_points(study.points, study.target is not None)
    click.echo()
    for line in words:
        click.echo(line)
    click.echo(f"\nreport: {path or folder / 'report.html'}")


def _load(path: Path, overrides: tuple[str, ...]) -> TrainConfig:
    from distrain.config import load_config

    return load_config(path, overrides, _check_torch_names)


def _check_torch_names(optimizer: OptimizerConfig | None, schedule: ScheduleConfig | None) -> list[tuple[str, str]]:
    """What only torch knows: optimizers, schedules and their keywords. Not asked for the plain ones, since it takes
    torch seconds to load."""
    plain = optimizer is None or (optimizer.name in ("SGD", "Adam", "AdamW") and not optimizer.options)
    if plain and schedule is None:
        return []
    from distrain.learning.schedules import check_optimization

    return check_optimization(optimizer, schedule)


def _fit(trainer: Trainer, as_json: bool) -> None:
    """Train, and print the result; where there is one, that of a run too which ends with an error, or was stopped."""
    try:
        result = trainer.fit()
    except DistrainError as error:
        if error.result is not None:
            _print_result(error.result.to_json(), as_json)
        raise
    _print_result(result.to_json(), as_json)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)


def _print_json(value: Any) -> None:
    """Print one line of JSON."""
    click.echo(json.dumps(jsonable(value), allow_nan=False))


if __name__ == "__main__":
    main()
