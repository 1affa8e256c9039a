"""What distrain is measured against is measured fairly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jobs import benchmark
from jobs.contenders import ddp, independent, ray_train
from jobs.contenders.spec import Spec


class Prepared(Exception):
    """The process was made ready, before anything else."""


@pytest.mark.parametrize("keeps_memory", [False, True])
@pytest.mark.parametrize("name", ["ddp", "independent", "ray_train"])
def test_contenders_get_distrains_memory_settings_where_they_are_measured_with_them(
    name: str, keeps_memory: bool, monkeypatch: pytest.MonkeyPatch
):
    def prepare(keeps: bool) -> None:
        raise Prepared(keeps)

    spec = replace(benchmark.MODELS["mlp32"], keeps_memory=keeps_memory)
    contender: Any = {
        "ddp": lambda: ddp.work(0, spec, ""),
        "independent": lambda: independent.work(0, spec, "", None),  # type: ignore[arg-type]
        "ray_train": lambda: ray_train.train_worker({"spec": spec.to_json()}),
    }[name]
    for module in (ddp, independent, ray_train):
        monkeypatch.setattr(module, "prepare_process", prepare)
    with pytest.raises(Prepared) as told:
        contender()
    assert told.value.args == (keeps_memory,)


@pytest.mark.parametrize("name", benchmark.CONTENDERS[len(benchmark.OURS) :])
def test_each_contender_is_measured_as_its_name_says(name: str, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []

    def output(command: list[str]) -> str:
        commands.append(command)
        return "1.5"

    monkeypatch.setattr(benchmark, "_output", output)
    assert benchmark.run_contender(name, benchmark.MODELS["mlp32"]) == 1.5
    [(_, _, module, spec)] = commands
    assert module == f"jobs.contenders.{name.split('_kept')[0]}"
    assert Spec.from_json(spec).keeps_memory == name.endswith("_kept")
