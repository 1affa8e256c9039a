"""A first signal stops the run, whatever else is broken; a second one ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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


def test_it_is_told_though_what_was_interrupted_holds_the_lock_that_telling_needs():
    code = (
        "import os, signal, sys, time\n"
        "from rich.console import Console\n"
        "from distrain.progress import TerminalProgress\n"
        "from distrain.signals import StopSignals\n"
        "progress = TerminalProgress(Console(file=sys.stderr, force_terminal=True))\n"
        "progress.phase('starting')\n"
        "with StopSignals(lambda: None):\n"
        "    with progress._lock:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.5)\n"
        "    time.sleep(0.5)\n"
        "progress.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=20)
    assert done.returncode == 0 and "finishing the step" in done.stderr


def test_the_second_one_ends_the_process():
    code = (
        "import os, signal, time; from distrain.signals import StopSignals\n"
        "with StopSignals(lambda: None):\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 143
