"""What `distrain plan` shows."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

from rich.console import Console

from distrain.preview import FilePreview, Preview
from distrain.progress import show_plan

PREVIEW = Preview(
    files=(
        *(FilePreview(f"data/part-{i}.parquet", 100, 2, 5000) for i in range(3)),
        FilePreview("data/held_out.parquet", 40, 1, 2000, "validation"),
    ),
    num_rows=300,
    num_validation_rows=40,
    num_features=None,
    num_outputs=10,
    batch_size=64,
    num_shards=2,
    smallest_microbatch=22,
    steps_per_epoch=5,
    epochs=3,
    total_steps=15,
    num_parameters=1234,
    num_workers=2,
    worker_bytes={"windows": 2_000_000, "model": 500_000},
    server_bytes={"parameters": 4936},
    cluster="a Ray of its own on this machine",
    asked={"CPU": 2.0, "memory": 1e9},
    there={"CPU": 2.0, "memory": 8e9},
)


def shown(preview: Preview) -> str:
    stream = io.StringIO()
    show_plan(preview, Console(file=stream, width=120, highlight=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_all_is_said():
    text = shown(PREVIEW)
    for line in (
        "data/part-0.parquet    training     100           2  5 kB",
        "data/held_out.parquet  validation    40           1  2 kB",
        "300 to train on, 40 to validate with",
        "64 rows in 2 shards; the smallest microbatch has 22 rows",
        "5 an epoch, 3 epochs, 15 in all",
        "? features, 10 outputs, 1,234 parameters",
        "about 2.5 MB of memory (windows 2 MB, model 500 kB)",
        "about 4.94 kB of memory (parameters 4.94 kB)",
        "CPU       2 asked for, 2 there",
        "memory    1 GB asked for, 8 GB there",
    ):
        assert line in text
    assert "too little" not in text


def test_what_is_lacking_is_said():
    short = replace(PREVIEW, asked={"CPU": 99.0, "GPU": 1.0}, warnings=("mind the gap [x]",))
    assert short.lacking == {"CPU": 97.0, "GPU": 1.0}
    text = shown(short)
    assert "too little CPU: 97 more would be needed" in text
    assert "too little GPU: 1 more would be needed" in text
    assert "mind the gap [x]" in text


def test_many_files_are_summed_up():
    text = shown(replace(PREVIEW, files=PREVIEW.files[:3] * 10))
    assert text.count("part-") == 12
    assert re.search(r"^and 18 more files +1,800 +36 +90 kB$", text, re.MULTILINE)


def test_it_goes_to_standard_output(capsys):
    show_plan(PREVIEW)
    captured = capsys.readouterr()
    assert "300 to train on" in captured.out
    assert captured.err == ""


def test_json():
    values = json.loads(json.dumps(PREVIEW.to_json()))
    assert values["files"][3] == {
        "path": "data/held_out.parquet", "num_rows": 40, "num_row_groups": 1, "size_bytes": 2000,
        "context": "validation",
    }  # fmt: skip
    assert values["worker_bytes"] == {"windows": 2_000_000, "model": 500_000}
    assert values["num_features"] is None
