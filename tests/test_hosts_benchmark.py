"""What the benchmark over hosts says where one of them fails."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import click
import pytest

from jobs import hosts_benchmark
from jobs.contenders.core import Exchange, Model
from jobs.hosts_benchmark import Setup, ddp_host, measure

SETUP = Setup("distrain", ("one", "two"), 29_999, Model(10), 1, 1, Exchange(1, "fp32", 0))


def test_the_first_hosts_result_is_taken():
    assert measure(SETUP, """echo hello {host}; echo '{{"ms": {number}.5}}'""") == 1.5


@pytest.mark.parametrize("failing", [1, 2])
def test_a_host_that_fails_ends_the_measurement_and_has_the_last_word(failing: int):
    began = time.monotonic()
    launch = f"[ {{number}} != {failing} ] && exec sleep 60; echo no route to {{host}} >&2; exit 255"
    with pytest.raises(click.ClickException, match=rf"exit code 255: {SETUP.hosts[failing - 1]} said:\nno route to"):
        measure(SETUP, launch)
    assert time.monotonic() - began < 30


def test_hosts_that_do_not_end_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts_benchmark, "TIMEOUT_S", 0.5)
    with pytest.raises(click.ClickException, match=r"no end after 0\.5 s: two said:\nstuck"):
        measure(SETUP, "[ {number} = 1 ] && exit; echo stuck >&2; exec sleep 60")


def test_a_rank_that_fails_fails_its_host(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts_benchmark, "ddp_rank", lambda setup, rank, results: os._exit(rank))
    with pytest.raises(click.ClickException, match="a rank failed"):
        ddp_host(replace(SETUP, workers=2), 1)


def test_a_launch_that_prints_nothing_is_said():
    with pytest.raises(click.ClickException, match="no result came back from one said:\nlost"):
        measure(SETUP, "echo lost >&2")
