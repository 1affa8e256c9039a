"""A first signal stops the run, whatever else is broken; a second one ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from distrain.signals import StopSignals
from tests.support.jobs import wait_for


class Closed:
    """Standard error whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_one_stops_though_nobody_reads(monkeypatch: pytest.MonkeyPatch, number: int):
    monkeypatch.setattr(sys, "stderr", Closed())
    stopped: list[bool] = []
    with StopSignals(lambda: stopped.append(True)) as signals:
        os.kill(os.getpid(), number)
        wait_for(lambda: stopped, 5, "the stop")
    assert signals.received == number


def test_it_is_told_though_the_terminal_is_being_written_to(capsys: pytest.CaptureFixture[str]):
    """What was interrupted holds the lock that telling needs."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=sys.stderr, force_terminal=True)
    with Live("", console=console, auto_refresh=False, redirect_stderr=True) as live, StopSignals(lambda: None):
        with live._lock:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        wait_for(lambda: "finishing the step" in capsys.readouterr().err, 5, "the word")


def test_the_second_one_ends_the_process():
    code = (
        "import os, signal, time; from distrain.signals import StopSignals\n"
        "with StopSignals(lambda: None):\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 143
