"""What distrain is measured against is measured fairly."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.contenders import ddp, independent, ray_train


@pytest.mark.parametrize("contender", [ddp.work, independent.work, ray_train.train_worker])
def test_no_contender_lacks_what_distrains_processes_are_given(contender: Any, monkeypatch: pytest.MonkeyPatch):
    class Prepared(Exception):
        """The process was made ready, before anything else."""

    def prepare() -> None:
        raise Prepared

    monkeypatch.setitem(contender.__globals__, "prepare_process", prepare)
    with pytest.raises(Prepared):
        contender(*[None] * contender.__code__.co_argcount)
