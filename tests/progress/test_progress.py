"""What a person sees of a run, with and without a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from distrain.progress import LineProgress, RunInfo, SilentProgress, TerminalProgress, make_progress
from distrain.records import Event, Report
from tests.support.records import START_MS, step, validation
from tests.support.results import without_a_step
from tests.support.terminal import terminal

INFO = RunInfo("a-run", total_steps=1000, steps_per_epoch=100, epochs=10, num_rows=6400, batch_size=64,
               num_parameters=1234, num_workers=2, tracking_uri="sqlite:///mlflow.db")  # fmt: skip
RESULT = {
    "run_id": "f" * 32, "run_name": "a-run", "status": "stopped", "reason": "validation loss stopped falling",
    "epochs": 4, "steps": 400, "samples": 25600, "samples_per_second": 17312.4, "train_loss": 0.12345,
    "validation": {"accuracy": 0.975, "loss": 0.1, "odd": None}, "checkpoint": "checkpoints/a-run/step-400",
    "worker_failures": 1, "seconds": {"startup": 6.2, "training": 61.0, "total": 67.9},
}  # fmt: skip
LOST = Event(START_MS, "lost", "worker 1 was [killed]", 120, 1)


def some(first=1, stop=101, **changes):
    return Report(steps=[step(n, **changes) for n in range(first, stop)])


def tell(progress):
    """A whole run."""
    progress.phase("starting workers")
    progress.started(INFO)
    progress.report(some())
    progress.report(Report(validations=[validation(100, loss=0.5, accuracy=0.9)], events=[LOST]))
    progress.note("by the way")
    progress.finished(RESULT)
    progress.close()
    progress.close()


def test_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    tell(LineProgress(stream, every_s=0.0))
    lines = stream.getvalue().splitlines()
    assert lines[:6] == [
        "starting workers",
        "run a-run: 6,400 rows, 100 steps an epoch, 10 epochs, 1,234 parameters, 2 workers",
        "epoch 1/10  step 100/1,000  loss 0.05187  6,400 samples/s  data 10% compute 60% waiting 0% exchange 20% "
        "update 10%  2 workers  0:09 left",
        "step 120: lost: worker 1 was [killed]",
        "validation after step 100: loss 0.5, accuracy 0.9 (360 rows, 0.1 s)",
        "by the way",
    ]
    assert "\x1b" not in stream.getvalue()


def test_lines_come_every_few_seconds_and_not_at_every_report():
    stream = io.StringIO()
    progress = LineProgress(stream, every_s=60.0)
    progress.started(INFO)
    for n in range(1, 50):
        progress.report(some(n, n + 1))
    assert len(stream.getvalue().splitlines()) == 1


def test_the_summary_says_how_it_went_and_how_to_look_further():
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.started(INFO)
    progress.finished(RESULT)
    shown = dict(re.findall(r"^(\S+(?: \S+)*)  +(.*?) *$", stream.getvalue(), re.MULTILINE))
    assert shown == {
        "status": "stopped: validation loss stopped falling", "epochs": "4", "steps": "400", "samples/s": "17,312",
        "train loss": "0.1235", "validation": "loss 0.1, accuracy 0.975", "workers lost": "1",
        "time": "startup 0:06, training 1:01, total 1:08", "checkpoint": "checkpoints/a-run/step-400",
        "MLflow run": "f" * 32,
    }  # fmt: skip
    commands = re.findall(r"^  (distrain .*?) +#", stream.getvalue(), re.MULTILINE)
    assert commands == [
        "distrain ui", "distrain resume checkpoints/a-run", "distrain evaluate checkpoints/a-run/step-400 DATA"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        (None, "distrain ui  "),
        ("sqlite:///mlflow.db", "distrain ui  "),
        ("sqlite:///other.db", "distrain ui CONFIG  "),
        ("http://mlflow:5000", "MLflow page   http://mlflow:5000"),
    ],
)
def test_the_summary_leads_to_the_page(uri, told):
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.started(replace(INFO, tracking_uri=uri, train_on="epochs=20"))
    progress.finished(RESULT | {"status": "finished", "steps": INFO.total_steps})
    assert told in stream.getvalue()
    assert "distrain resume checkpoints/a-run epochs=20  " in stream.getvalue()


@pytest.mark.parametrize("train_on, steps", [("", 1000), ("epochs=20", 400)])
def test_the_summary_offers_to_train_on_only_where_that_would_do_something(train_on, steps):
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.started(replace(INFO, train_on=train_on))
    result = {"status": "finished", "steps": steps, "checkpoint": "s3://bucket/runs/a-run/step-400"}
    progress.finished(RESULT | result)
    assert "distrain resume" not in stream.getvalue()
    assert "distrain evaluate s3://bucket/runs/a-run/step-400 DATA" in stream.getvalue()


def test_a_phase_after_the_last_step_is_shown_below_the_lines():
    console, shown = terminal(110)
    progress = TerminalProgress(console)
    progress.phase("starting workers")
    progress.started(INFO)
    progress.report(some())
    progress.phase("storing the model in MLflow")
    console.print(progress._render())
    progress.close()
    assert re.search(r"update 10%.*\n.*storing the model in MLflow", shown.getvalue())


def test_a_summary_of_little_says_little():
    class Result:
        def to_json(self):
            return {"status": "finished", "run_id": None, "validation": {}, "checkpoint": None, "train_loss": None}

    stream = io.StringIO()
    LineProgress(stream).finished(Result())
    assert stream.getvalue().split() == ["status", "finished"]


@pytest.mark.parametrize("status", ["finished", "stopped"])
def test_a_run_without_a_step_has_a_summary_as_well(status):
    stream, (console, shown) = io.StringIO(), terminal(110)
    for progress in (LineProgress(stream), TerminalProgress(console)):
        progress.started(INFO)
        progress.finished(without_a_step(status=status))
    for text in (stream.getvalue(), re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())):
        assert re.search(r"time +training 0:00, total 0:05", text)
        assert "startup" not in text and "nan" not in text and "validation" not in text


def test_live_lines_on_a_terminal():
    console, shown = terminal(110)
    progress = TerminalProgress(console)
    progress.started(INFO)
    progress.report(some(301, 401, workers=1))
    progress.report(Report(validations=[validation(400, loss=0.5, accuracy=0.9)], events=[LOST]))
    console.print(progress._render())
    progress.finished(RESULT)
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())
    assert "step 120: lost: worker 1 was [killed]" in text
    assert re.search(r"epoch 4/10 +step 400/1,000 .* 40% +0:0\d elapsed, 0:06 left", text)
    assert "6,400 samples/s   1 worker of 2" in text
    assert "validation loss 0.5, accuracy 0.9 (step 400)" in text
    bar = "█" * 3 + "▓" * 18 + "▒" * 6 + "░" * 3
    assert f"time {bar}  █ data 10%  ▓ compute 60%  · waiting 0%  ▒ exchange 20%  ░ update 10%" in text
    assert "distrain resume checkpoints/a-run" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


@pytest.mark.parametrize("width", [30, 60, 200])
def test_any_width_does(width):
    console, shown = terminal(width)
    tell(TerminalProgress(console))
    assert "stopped" in shown.getvalue()


def test_silence():
    tell(SilentProgress())


SCRIPT = """
from distrain.progress import make_progress, RunInfo
progress = make_progress()
progress.started(RunInfo("a-run", 1000, 100, 10, 6400, 64, 1234, 2))
print("the result")
raise SystemExit(3)
"""


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_on_a_real_terminal_results_stay_apart_and_the_cursor_comes_back(no_colour):
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"} | ({"NO_COLOR": "1"} if no_colour else {})
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdin=far, stderr=far, stdout=subprocess.PIPE, env=environment, check=False
    )
    os.close(far)
    shown = b""
    while True:
        try:
            shown += os.read(near, 65536)
        except OSError:  # its end
            break
    os.close(near)
    assert (ended.returncode, ended.stdout) == (3, b"the result\n")
    assert b"run a-run" in shown
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
    assert bool(re.search(rb"\x1b\[[\d;]*3[0-8]", shown)) == (not no_colour)


def test_without_a_terminal_there_are_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_progress(), LineProgress)


def test_a_reader_that_goes_away_does_not_end_the_run():
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    progress = LineProgress(stream)
    progress.note("one")
    assert os.read(read, 100) == b"one\n"
    os.close(read)
    progress.phase("two")
    progress.started(INFO)
    progress.report(some(301, 401, workers=1))
    progress.finished(RESULT)
    progress.close()
    stream.close()  # what could not be written is no error at the end either


def test_a_program_whose_reader_goes_away_ends_as_it_would():
    code = "from distrain.progress import LineProgress as P; p = P(); p.note('1'); p.note('2'); raise SystemExit(7)"
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([sys.executable, "-c", code], stderr=write, timeout=60).returncode == 7
    os.close(write)
