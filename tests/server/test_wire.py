"""Runs whose hosts exchange bfloat16: the same bits whatever the hosts, slices, faults and resumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from distrain.checkpoint import Snapshot
from distrain.config import ScheduleConfig, load_config
from distrain.exchange.link import Frame, Kind, SocketLink
from distrain.learning.fingerprint import parameters_sha256
from distrain.preparation import prepare
from distrain.server.loop import LoopSettings
from distrain.worker import WorkerOptions
from tests.server.test_hosts import MortalRelay, cut_in_pieces_of, finish, job, on_any_hosts, spread
from tests.support.runs import Job, Mortal, Run, open_run, start_relay, start_worker, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def many_pieces() -> Iterator[None]:
    """Vectors cross in several pieces, as those of large models do, and lie as those do: the bits depend on that."""
    with pytest.MonkeyPatch.context() as patch:
        cut_in_pieces_of(48, patch)
        yield


def rounded(**loop) -> Job:
    return replace(job(**loop), options=WorkerOptions(wire_dtype="bf16"))


def last_snapshot(run: Run) -> Snapshot:
    run.reports.drain()
    while (snapshot := run.reports.take_snapshot()) is not None:
        last = snapshot
    return last


@pytest.fixture(scope="module")
def on_one_host() -> str:
    return train(rounded())[0].outcome.parameters_sha256


def test_the_bits_are_not_those_of_float32_and_the_model_is_as_good(on_one_host):
    ours, report = train(rounded(), 2)
    whole, reference = train(job())
    assert ours.outcome.parameters_sha256 == on_one_host != whole.outcome.parameters_sha256
    losses = [each.validations[-1].metrics["loss"] for each in (report, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] < report.validations[0].metrics["loss"]


@pytest.mark.parametrize("links", ["unix", "tcp"])
@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_any_number_of_workers_gives_the_same_bits(on_one_host, num_workers: int, links: str):
    assert train(rounded(num_workers=num_workers), num_workers, links)[0].outcome.parameters_sha256 == on_one_host


@on_any_hosts
def test_any_hosts_and_slices_give_the_same_bits(on_one_host, workers: list[int], slices: int):
    run = spread(rounded(num_workers=sum(workers), slices=slices), workers)
    assert finish(run) == on_one_host


@pytest.mark.parametrize("slices", [1, 2])
def test_what_is_saved_are_float32_parameters_and_what_workers_read_are_not(slices: int):
    run = spread(rounded(num_workers=2, slices=slices, max_steps=9), [1, 1])
    sha256 = finish(run)
    snapshot = last_snapshot(run)
    with run.server.exported() as model:
        assert parameters_sha256(model) == sha256
    saved = load(snapshot.model)
    weights = torch.cat([saved[name].flatten() for name in dict(run.server.model.named_parameters())])
    assert (weights.to(torch.bfloat16).float() != weights).float().mean() > 0.9
    read = run.server.published[0].floats[: run.server.layout.num_gradients]
    assert torch.equal(read.to(torch.bfloat16).float(), read) and read.abs().sum() > 0


@pytest.mark.parametrize("staleness", [1, 2])
def test_staleness_over_hosts_and_slices_gives_the_same_bits(staleness: int):
    expected = train(rounded(staleness=staleness))[0].outcome.parameters_sha256
    for slices in (1, 2):
        assert finish(spread(rounded(num_workers=3, staleness=staleness, slices=slices), [1, 1, 1])) == expected


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_worker_costs_no_bit(on_one_host, when: str, slices: int):
    Mortal.deaths, Mortal.died = {2: (5, when)}, []
    assert finish(spread(rounded(num_workers=4, slices=slices), [1, 2, 1], cls=Mortal)) == on_one_host
    assert Mortal.died == [2]


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_host_that_dies_costs_no_bit(on_one_host, when: str, slices: int):
    MortalRelay.when, MortalRelay.died = when, 0
    assert finish(spread(rounded(num_workers=4, slices=slices), [1, 1, 2], relay_cls=MortalRelay)) == on_one_host
    assert MortalRelay.died == 1


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("staleness", [0, 1])
def test_stopped_and_resumed_at_another_number_of_slices(before: int, after: int, staleness: int):
    def job_of(**loop) -> Job:  # a plateau would look at the validation with which `max_steps` ends
        schedule = ScheduleConfig(name="CosineAnnealingLR", T_max=20)
        return replace(rounded(staleness=staleness, **loop), schedule=schedule)

    expected = train(job_of())[0].outcome.parameters_sha256
    first = spread(job_of(max_steps=13, num_workers=2, slices=before), [1, 1, 0])
    finish(first)
    snapshot = last_snapshot(first)
    the_job = job_of(num_workers=2, slices=after)
    run = open_run(the_job)
    run.loop.restore(13, load(snapshot.model), snapshot.state, load(snapshot.optimizer))
    run.relays = [start_relay(run, the_job, s) for s in range(after - 1)] or [start_relay(run, the_job)]
    start_worker(run, the_job, 0)
    start_worker(run, the_job, 1, relay=run.relays[0])
    assert finish(run) == expected


@pytest.mark.parametrize("slices", [1, 2])
def test_half_the_bytes_cross_between_hosts(monkeypatch, slices: int):
    send, sent = SocketLink.send, []

    def counting(link: SocketLink, frame: Frame, *how: Any) -> None:
        if not link.shared:
            sent[-1][frame.kind] += memoryview(frame.payload).nbytes
        send(link, frame, *how)

    monkeypatch.setattr(SocketLink, "send", counting)
    for make in (job, rounded):
        sent.append(Counter())
        the_job = make(num_workers=2, slices=slices, epochs=1)
        run = spread(replace(the_job, validation=None), [1, 1])
        finish(run)
    whole, half = sent
    layout = run.server.layout
    share = 1 - layout.num_gradients / layout.num_floats  # of the buffers, which stay float32
    for kind in (Kind.PIECE, Kind.PUBLISH):
        assert whole[kind] > 9 * 4 * layout.num_gradients * 0.9
        assert half[kind] / whole[kind] == pytest.approx((1 + share) / 2, abs=0.02)


def test_digits_are_learnt_as_well():
    config = load_config(ROOT / "jobs" / "digits.yaml").in_folder(ROOT)
    prepared = prepare(config)
    accuracy = {}
    for dtype in ("fp32", "bf16"):
        the_job = Job(
            prepared.train, prepared.task, prepared.validation, config.optimizer, config.schedule, config.clip,
            LoopSettings(epochs=config.epochs), options=WorkerOptions(wire_dtype=dtype),
        )  # fmt: skip
        accuracy[dtype] = train(the_job)[0].outcome.validation["accuracy"]
    assert accuracy["fp32"] > 0.97 and accuracy["bf16"] >= accuracy["fp32"] - 0.005, accuracy
