"""One process trains a run at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distrain.errors import CheckpointError
from distrain.run_lock import is_trained, run_lock

HOLD = """
import sys, time
from pathlib import Path
from distrain.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_run_is_trained_once_at_a_time_and_again_after_whatever_end(tmp_path: Path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(CheckpointError, match="another process of this machine trains this run") as refused:
            run_lock(tmp_path / "link/run").__enter__()
        assert refused.value.exit_code == 2
        assert is_trained(tmp_path / "run") and not is_trained(tmp_path / "another")
    finally:
        other.kill()
        other.communicate(timeout=20)
    assert not is_trained(tmp_path / "run")
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]
    with run_lock(tmp_path / "run"):
        pass
