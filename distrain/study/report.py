"""A sweep's report: table, figures and recommendation, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from distrain.durable import write_file
from distrain.errors import CheckpointError
from distrain.study.advice import Advice, advise, in_words, seconds
from distrain.study.claims import claims
from distrain.study.point import Point
from distrain.study.record import FILE, Study
from distrain.study.step_time import StepTimeFit
from distrain.study.sweep_figures import FIGURES, critical_batch
from distrain.tracking import ParentRun, read_parent

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right;
border-bottom: 1px solid #d1d9e0; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; }
figure { margin: 2rem 0; } figcaption, .small { color: #59636e; font-size: 13px; } .failed { color: #d1242f; }
ul.advice { background: #f6f8fa; padding: 1rem 1rem 1rem 2.2rem; border-radius: 6px; }
tr.chosen td { background: #dafbe1; }
"""


@dataclass(frozen=True)
class Report:
    """What a sweep comes to: for a page, for the terminal, for MLflow."""

    html: str
    words: list[str]
    figures: dict[str, Figure]


def find(reference: str, root: str, uri: str) -> tuple[Study, Path | None]:
    """A sweep by its folder, its name in `root`, or its parent run's id in the store at `uri`.

    Raises CheckpointError or TrackingError where there is none.
    """
    for folder in (Path(reference), Path(root, reference)):
        if (folder / FILE).exists():
            return Study.load(folder), folder
    if re.fullmatch(r"[0-9a-f]{32}", reference):
        try:
            return Study.from_text(read_parent(uri, reference, FILE)), None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"run {reference}: its {FILE} cannot be read: {error}") from error
    raise CheckpointError(
        f"{reference}: no sweep of that name in {root}/, no folder with a {FILE}, and not the id of an MLflow run"
    )


def build(study: Study) -> Report:
    """Put the report together."""
    has_target = study.target is not None
    advice = advise(study.points, has_target)
    words = conclusions(study, advice)
    figures = {name: figure for name, (draw, _) in FIGURES.items() if (figure := draw(study.points)) is not None}
    return Report(_page(study, advice, words, figures), words, figures)


def publish(study: Study, folder: Path, parent: ParentRun) -> Report:
    """Build the report, write it to `folder`/report.html, and store it on the parent run in MLflow."""
    report = build(study)
    write_file(folder / "report.html", report.html.encode())
    parent.text(FILE, study.to_text())
    parent.text("report.html", report.html)
    parent.text("recommendation.txt", "\n".join(report.words) + "\n")
    for name, figure in report.figures.items():
        parent.figure(f"{name}.png", figure)
    finished = [point for point in study.points if point.is_finished]
    if finished:
        parent.table("points.json", [_row(point) for point in finished])
    return report


def conclusions(study: Study, advice: Advice) -> list[str]:
    """What the sweep says, a sentence each."""
    words = [in_words(choice) for choice in advice.choices] or [f"no recommendation: {advice.basis}."]
    words += claims(study.points)
    fitted = critical_batch(study.points)
    if fitted is not None:
        fit, _ = fitted
        if fit.min_steps > 0 and fit.min_samples > 0:
            words.append(
                f"critical batch size: {fit.batch_size:,.0f} rows (fit error {100 * fit.error:.0f} %): below it, twice "
                "the batch takes nearly half the steps; above it, it mostly takes more samples."
            )
        elif fit.min_steps <= 0:
            words.append("critical batch size: above all sizes measured; a larger batch would still take fewer steps.")
        else:
            words.append("critical batch size: below all sizes measured; a smaller batch would take no more steps.")
    noise = [point.noise_scale for point in study.points if point.noise_scale]
    if noise:
        words.append(
            f"gradient noise scale, which estimates the critical batch size from norms: {min(noise):,.0f} to "
            f"{max(noise):,.0f} rows over the points."
        )
    failed = [point for point in study.points if not point.is_finished]
    words += [f"{point.name} {point.status}: {point.reason.splitlines()[0]}" for point in failed if point.reason]
    missed = [point.name for point in study.points if point.is_finished and study.target and point.target is None]
    if missed:
        words.append(f"the target was not reached by: {'; '.join(missed)}.")
    crowded = [p for p in study.points if p.workers > study.num_cores > 0]
    if crowded:
        words.append(
            f"{max(p.workers for p in crowded)} workers shared {study.num_cores:g} cores: their speeds say nothing of "
            "workers with cores of their own."
        )
    return words


def _row(point: Point) -> dict[str, object]:
    """A point as a flat row."""
    target = point.target
    row: dict[str, object] = {str(key): value for key, value in point.values.items()}
    row |= {
        "samples_per_second": round(point.samples_per_second, 1),
        "step_ms": round(1000 * point.step_s, 3),
        "validation_loss": point.validation.get("loss"),
        "accuracy": point.validation.get("accuracy"),
        "steps_to_target": target.step if target else None,
        "samples_to_target": target.samples if target else None,
        "seconds_to_target": round(target.seconds, 3) if target else None,
        "worker_seconds_to_target": round(target.seconds * point.workers, 3) if target else None,
    }
    return row


def _page(study: Study, advice: Advice, words: list[str], figures: dict[str, Figure]) -> str:
    target = study.target
    aim = f"Target: validation {target['metric']} {target['value']:g}. " if target else ""
    chosen = {choice.cost.point.name for choice in advice.choices}
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{html.escape(study.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(study.name)}</h1>",
        f"<p>{aim}{len(study.points)} points on {study.num_cores:g} cores. Learning rate scaled with the batch size: "
        f"{html.escape(study.scale_lr)}.</p>",
        "<h2>What pays</h2><ul class='advice'>",
        *(f"<li>{html.escape(line)}</li>" for line in words),
        "</ul><h2>Points</h2>",
        _table(study.points, target is not None, chosen),
        *(_picture(name, figure) for name, figure in figures.items()),
        _prediction(study),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part)


def _table(points: list[Point], has_target: bool, chosen: set[str]) -> str:
    head = ["point", "samples/s", "step, ms", "training loss", "validation"]
    head += ["steps to target", "samples", "time", "worker time"] if has_target else ["training time"]
    rows = []
    for point in points:
        if not point.is_finished:
            reason = html.escape(point.reason.splitlines()[0] if point.reason else "")
            rows.append(f"<tr class='failed'><td>{html.escape(point.name)}</td>"
                        f"<td colspan='{len(head) - 1}'>{point.status}: {reason}</td></tr>")  # fmt: skip
            continue
        validation = ", ".join(f"{name} {value:.4g}" for name, value in point.validation.items())
        cells = [
            f"{point.samples_per_second:,.0f}",
            f"{1000 * point.step_s:.2f}",
            f"{point.train_loss:.4g}",
            validation,
        ]
        target = point.target
        if has_target and target is None:
            cells += ["not reached", "", "", ""]
        elif target is not None:
            cells += [f"{target.step:,}", f"{target.samples:,}", seconds(target.seconds),
                      seconds(target.seconds * point.workers)]  # fmt: skip
        else:
            cells.append(seconds(point.seconds))
        mark = " class='chosen'" if point.name in chosen else ""
        rows.append(f"<tr{mark}><td>{html.escape(point.name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    header = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _picture(name: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    caption = html.escape(FIGURES[name][1])
    return f"<figure><img alt='{name}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>"


def _prediction(study: Study) -> str:
    """The fitted model of a step's time, in words."""
    try:
        fit = StepTimeFit(study.points)
    except ValueError:
        return ""
    m = fit.model
    return (
        "<h2>Model of a step's time</h2><p>"
        f"A worker computes {1e3 * m.per_microbatch:.3g} ms for each microbatch and {1e6 * m.per_row:.3g} microseconds "
        f"for each row; exchange takes {1e3 * m.exchange:.3g} ms and {1e3 * m.per_message:.3g} ms for each worker, the "
        f"update {1e3 * m.update:.3g} ms; chance makes the slowest worker {100 * m.straggling:.2g} % x sqrt(2 ln "
        "workers) slower. "
        f"The fit is off by {100 * fit.error:.1f} % (root mean square) at the measured points.</p>"
        "<p class='small'>distrain plan CONFIG --sweep SWEEP --workers 64 says what it predicts.</p>"
    )
