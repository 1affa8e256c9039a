"""The benchmark for a machine without Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distrain import bench_core

ALONE = """
import sys
from distrain import bench_core
bench_core.main(sys.argv[1:])
loaded = {"ray", "mlflow", "rich", "click", "matplotlib", "scipy", "sklearn", "psutil"} & set(sys.modules)
assert not loaded, loaded
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ALONE, *arguments], capture_output=True, text=True, timeout=200)


def test_it_trains_without_ray_and_prints_the_same_weights_at_each_worker_count():
    done = run("--model", "mlp784,mlp32", "--rows", "2000", "--steps", "2", "--precision", "fp32,bf16")
    assert done.returncode == 0, done.stderr
    head, *lines = (line.split() for line in done.stdout.splitlines())
    assert head[:5] == ["model", "device", "precision", "workers", "samples/s"]
    runs = {tuple(line[:4]): line[-1] for line in lines}
    assert list(runs) == [(model, "cpu", precision, workers) for model in ("mlp784", "mlp32")
                          for precision in ("fp32", "bf16") for workers in ("1", "2")]  # fmt: skip
    weights = list(runs.values())
    assert weights[::2] == weights[1::2], "of one worker and of two"
    assert len(set(weights)) == 4, "of each model and precision"


def test_no_gpu_is_said_in_a_line():
    done = run("--device", "cuda", "--model", "mlp32", "--rows", "2000", "--steps", "1", "--workers", "1")
    assert done.returncode == 3
    assert "cannot compute on it: its torch" in done.stderr and "build without CUDA" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--workers", "0"], "counts such as 1,2"), (["--precision", "fp8"], "no 'fp8'; there are fp32, bf16, fp16")],
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        bench_core.main(arguments)
    assert said in capsys.readouterr().err
