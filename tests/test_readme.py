"""What the README shows is what works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from distrain.config import TrainConfig
from distrain.preparation import check_own_code, prepare

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str, word: str) -> str:
    """The fenced block of the README with this word in it."""
    [found] = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in text]
    return found


@pytest.mark.parametrize("transform", [None, "my_code:rows"])
def test_own_model_loss_and_transform_fit_two_rows(
    transform: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    Path("my_code.py").write_text(block("python", "def pinball"))
    pq.write_table(pa.table({"x": [[1.0, 2.0, 3.0], [3.0, 4.0, 1.0]], "y": [1.0, 2.0]}), "rows.parquet")
    job = yaml.safe_load(block("yaml", "my_code:build"))
    [loss] = re.findall(r'or (\{factory: "my_code:pinball".*\})', README)
    data = {"train": "rows.parquet", "label": "y", "features": "x", "transform": transform}
    settings = {"data": data, "model": job["model"], "loss": yaml.safe_load(loss), "batch_size": 2, "shards": 1}
    check_own_code(prepare(TrainConfig.from_mapping(settings)))


def test_the_job_shown_is_a_configuration():
    config = TrainConfig.from_mapping(yaml.safe_load(block("yaml", "my_code:build")))
    assert config.workers.count == 4 and config.clip is not None
