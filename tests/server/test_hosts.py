"""Runs over several hosts, each with a relay, and over several slices, in one process: the same bits as on one host."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest
from safetensors.torch import load
from torch import Tensor, nn

from distrain.checkpoint import Snapshot
from distrain.config import (
    AveragingConfig,
    ClipConfig,
    GradientNoiseConfig,
    ModelConfig,
    OptimizerConfig,
    PenaltyConfig,
    ScheduleConfig,
)
from distrain.devices import Arithmetic
from distrain.errors import DivergenceError, LinkError, ServerLost
from distrain.exchange.link import Frame, Kind, rows_digest
from distrain.exchange.sums import Incoming, open_frame, sum_frame
from distrain.exchange.wire import WireDtype
from distrain.reduction import Block, Partial
from distrain.relay import Relay
from distrain.server.loop import LoopSettings
from distrain.server.members import Batch, Host, Member, Pushed
from distrain.worker import Worker, WorkerOptions
from tests.devices.test_precision import TOO_LARGE
from tests.server import test_loop, test_nonfinite
from tests.server.test_loop import source
from tests.support.links import InMemoryLink
from tests.support.runs import Job, KilledWorker, Mortal, Run, open_run, start_relay, start_worker, task, train

WITH_EVERYTHING = {
    "clip": ClipConfig(norm=0.5),
    "penalty": PenaltyConfig(l1=0.01, l2=0.02),
    "schedule": ScheduleConfig(name="ReduceLROnPlateau", patience=0, threshold=0.9, warmup_steps=3),
}


def cut_in_pieces_of(num_floats: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("distrain.exchange.layout.PIECE_FLOATS", num_floats)


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Vectors cross in several pieces, and are added up in several chunks, as those of large models are."""
    cut_in_pieces_of(48, monkeypatch)
    monkeypatch.setattr("distrain.server.parameter_server.CHUNK_FLOATS", 64)


def job(**loop) -> Job:
    settings = LoopSettings(**{"epochs": 3, **loop})
    model = task({"hidden": [8, 8], "normalization": "batch"})
    return Job(source(), model, source(50, shuffle=False), loop=settings, **WITH_EVERYTHING)


@pytest.fixture(scope="module")
def on_one_host() -> str:
    run, report = train(job())
    assert any(r.clipped for r in report.steps) and len({r.lr for r in report.steps}) > 4, "or the job tests less"
    return run.outcome.parameters_sha256


def spread(the_job: Job, workers: list[int], cls: type[Worker] = Worker, relay_cls: type[Relay] = Relay) -> Run:
    """Open a run with so many workers on each host: the server's own, then those with relays, of which the first own
    slices."""
    run = open_run(the_job)
    run.relays = []
    rank = 0
    for host, count in enumerate(workers):
        slice_ = host - 1 if 0 < host < the_job.loop.slices else None
        relay = start_relay(run, the_job, slice_, relay_cls) if host else None
        run.relays.append(relay)
        for _ in range(count):
            start_worker(run, the_job, rank, cls=cls, relay=relay, launch=rank)
            rank += 1
    return run


def finish(run: Run) -> str:
    run.outcome = run.loop.run()
    for relay in filter(None, run.relays):
        relay.thread.join(10)
        assert not relay.thread.is_alive(), "a relay did not end with the run"
    return run.outcome.parameters_sha256


on_any_hosts = pytest.mark.parametrize(
    ("workers", "slices"),
    [([1, 1], 1), ([0, 2, 1], 1), ([2, 2], 2), ([0, 1], 2), ([1, 1, 2], 3), ([1, 0, 0, 3], 3)],
)
"""The workers of each host, and how many of the hosts own a slice."""


@on_any_hosts
def test_any_hosts_and_slices_give_the_same_bits(on_one_host, workers: list[int], slices: int):
    run = spread(job(num_workers=sum(workers), slices=slices), workers)
    assert finish(run) == on_one_host
    report = run.reports.drain()
    assert [r.samples for r in report.steps] == ([16] * 8 + [9]) * 3
    assert {r.workers for r in report.steps} == {sum(workers)}
    assert report.validations[-1].metrics["loss"] < report.validations[0].metrics["loss"]


@on_any_hosts
@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("piece_floats", [16, 10**6])
def test_vectors_cross_in_pieces_of_any_length(
    monkeypatch, workers: list[int], slices: int, wire_dtype: WireDtype, piece_floats: int
):
    def job_of(**loop) -> Job:
        return replace(job(epochs=1, **loop), options=WorkerOptions(wire_dtype=wire_dtype))

    cut_in_pieces_of(piece_floats, monkeypatch)
    expected = train(job_of())[0].outcome.parameters_sha256
    assert finish(spread(job_of(num_workers=sum(workers), slices=slices), workers)) == expected


@pytest.mark.parametrize("slices", [1, 2])
def test_a_worker_elsewhere_without_a_relay_pushes_to_the_server(on_one_host, slices: int):
    the_job = job(num_workers=3, slices=slices)
    run = spread(the_job, [1, 1])
    start_worker(run, the_job, 2, same_node=False)
    assert finish(run) == on_one_host


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_rows_that_are_not_finite_are_left_out_on_every_host(monkeypatch, staleness: int, slices: int):
    cut_in_pieces_of(16, monkeypatch)

    def job_of(**loop) -> Job:  # the gradient of row 37 is not finite, though its loss is; that of row 90 neither
        return test_nonfinite.job({37: 7.0, 90: float("nan")}, spec=test_nonfinite.STEEP, staleness=staleness, **loop)

    expected = train(job_of())[0].outcome
    run = spread(job_of(num_workers=3, slices=slices), [1, 1, 1])
    assert finish(run) == expected.parameters_sha256
    assert run.outcome.skipped.microbatches == expected.skipped.microbatches == 4


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_steps_without_weight_change_nothing_on_any_host(staleness: int, slices: int):
    def job_of(**loop) -> Job:
        return test_loop.without_weight(*test_loop.LAST_STEP, (3, 1), staleness=staleness, **loop)

    run = spread(job_of(num_workers=3, slices=slices), [1, 1, 1])
    assert finish(run) == train(job_of())[0].outcome.parameters_sha256
    assert [record.samples for record in run.reports.drain().steps] == ([16] * 8 + [9]) * 2


def test_a_host_may_be_lost_while_a_sum_of_it_waits_for_the_servers_word():
    run, link = open_run(job()), Mock(shared=False, sending=False)
    hosts, layout = run.loop._hosts, run.server.layout
    host = hosts.welcome(link, {"relay": True, "launch": 0, "slice": None, "tcp": None, "layout": layout.digest})
    piece = Frame(Kind.PIECE, 3, stop=layout.num_floats, slot=host.number)
    piece.payload = hosts.slice_sums.place(piece)
    hosts.note(host, open_frame(3, 0, 1, host.number, 0, Block(0, 1)))
    hosts.note(host, piece)
    hosts._open[3] = Mock()  # type: ignore[index]
    hosts.note(host, sum_frame(3, host.number, 0, Block(0, 1), 77, Partial(None, 1, 0.0, 1.0)))
    assert hosts._early[3]
    hosts.lose(link, "a test")
    del hosts._open[3]  # type: ignore[attr-defined]
    hosts.forget(3)
    assert not hosts._early and not hosts.slice_sums._whole
    run.hub.close()


def test_a_sum_of_a_round_that_is_over_gives_its_memory_back():
    run, link = open_run(job()), Mock(shared=False, sending=False)
    hosts, layout = run.loop._hosts, run.server.layout
    host = hosts.welcome(link, {"relay": True, "launch": 0, "slice": None, "tcp": None, "layout": layout.digest})
    hosts.note(host, open_frame(3, 0, 1, host.number, 0, Block(0, 1)))
    for first, stop in ((0, 48), (48, layout.num_floats)):
        piece = Frame(Kind.PIECE, 3, first=first, stop=stop, slot=host.number)
        piece.payload = hosts.slice_sums.place(piece)
        hosts.note(host, piece)
    hosts.note(host, sum_frame(3, host.number, 0, Block(0, 1), 77, Partial(None, 1, 0.0, 1.0)))
    assert not hosts._early and not run.server.wire.pool._free
    hosts.forget(2)
    assert not hosts.slice_sums._whole and run.server.wire.pool._free
    run.hub.close()


class CountingRelay(Relay):
    sums: ClassVar[list[tuple[int, int, int]]] = []
    pulls: ClassVar[list[tuple[int, int, int]]] = []

    def join(self, *server: Any) -> None:
        send = self._hub.send

        def counting(link, sent, **how):
            if sent.kind is Kind.SUM:
                self.sums.append((sent.round, sent.first, sent.stop))
            send(link, sent, **how)

        self._hub.send = counting
        super().join(*server)

    def _take_parameters(self, frame: Frame) -> None:
        self.pulls.append((frame.read, frame.first, frame.stop))
        super()._take_parameters(frame)


def test_a_host_of_two_workers_sends_one_sum_and_takes_one_set_of_parameters_a_step(on_one_host):
    CountingRelay.sums, CountingRelay.pulls = [], []
    # Shards 0-1 of 4 on the server's host, 2-3 on the other.
    run = spread(job(num_workers=4), [2, 2], relay_cls=CountingRelay)
    assert finish(run) == on_one_host
    spans = [(first, stop) for _, first, stop in CountingRelay.sums]
    assert (2, 4) in spans and len(spans) < 2 * 27, "one a step, but where a change of shares split it"
    for read in range(28):
        pieces = sorted((first, stop) for update, first, stop in CountingRelay.pulls if update == read)
        assert pieces[0][0] == 0 and pieces[-1][1] == run.server.layout.num_floats
        assert len(pieces) > 3 and all(a[1] == b[0] for a, b in pairwise(pieces)), "each value once"


class ToldRelay(Relay):
    """Notes of each update whether the norm came with the word to make it."""

    had_norm: ClassVar[list[bool]] = []

    def _from_server(self, frame: Frame) -> None:
        if frame.kind is Kind.APPLY:
            self.had_norm.append(len(frame.payload) > 8 * frame.stop)
        super()._from_server(frame)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_owners_have_added_up_and_said_so_before_they_are_to_update(staleness: int):
    ToldRelay.had_norm = []
    expected = train(job(staleness=staleness))[0].outcome.parameters_sha256
    run = spread(job(num_workers=4, slices=2, staleness=staleness), [2, 2], relay_cls=ToldRelay)
    assert finish(run) == expected
    assert len(ToldRelay.had_norm) == 27 and sum(ToldRelay.had_norm) > 13, "but where a helper's copy comes as well"


class HastyRelay(Relay):
    """Its sums are with their owners before the server hears of the pushes."""

    def _from_worker(self, worker: Any, frame: Frame) -> None:
        send, held = self._hub.send, []

        def holding(link, sent, **how):
            if sent.kind is Kind.PUSH:
                held.append((link, sent))
            else:
                send(link, sent, **how)

        self._hub.send = holding
        super()._from_worker(worker, frame)
        self._hub.send = send
        time.sleep(0.01)
        for each in held:
            send(*each)


@pytest.mark.parametrize(("workers", "slices"), [([1, 2], 1), ([1, 1, 2], 3)])
def test_sums_may_come_before_it_is_known_that_they_count(on_one_host, workers: list[int], slices: int):
    run = spread(job(num_workers=sum(workers), slices=slices), workers, relay_cls=HastyRelay)
    assert finish(run) == on_one_host


class Slow(nn.Module):
    """Its first backward passes get to its first layer once an owner has heard of a gradient from elsewhere."""

    heard: ClassVar[threading.Event]
    was_heard: ClassVar[list[bool]]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.others = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.was_heard.append(self.heard.wait(10)))
        return self.others(hidden)


def slow() -> nn.Module:
    return Slow()


@pytest.mark.parametrize(("workers", "slices"), [([2, 2], 1), ([1, 2, 1], 2)])
def test_gradients_leave_a_host_while_backward_computes_others(monkeypatch, workers: list[int], slices: int):
    Slow.heard, Slow.was_heard = threading.Event(), []
    take = Incoming.take
    monkeypatch.setattr(Incoming, "take", lambda self, piece: (Slow.heard.set(), take(self, piece))[1])
    spec = task({"factory": f"{__name__}:slow"})
    finish(spread(replace(job(num_workers=sum(workers), slices=slices, max_steps=2), task=spec), workers))
    assert Slow.heard.is_set() and all(Slow.was_heard)


def test_a_sum_counts_only_where_it_is_of_the_pushes_that_count():
    member = Member(0, 7, InMemoryLink.pair()[0], None, 0)
    pushes = [Pushed(member, slot, Block(first, first + 1)) for slot, first in ((0, 2), (1, 3))]
    batch = Batch(pushes, 0.0, {0: 2})
    ours = [push.row for push in pushes]
    assert batch.has(Block(2, 4), rows_digest(ours)) and batch.has(Block(3, 4), rows_digest(ours[1:]))
    theirs = [ours[0], (8, 0, 3, 4)]
    assert not batch.has(Block(2, 4), rows_digest(theirs)), "another worker's push of the same shard"
    assert not batch.has(Block(0, 4), rows_digest([(7, 0, 0, 2), *ours])), "more than counts"
    assert not batch.has(Block(0, 2), rows_digest([])), "nothing of it"


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("staleness", [1, 2])
def test_staleness_over_hosts_and_slices_gives_the_same_bits(staleness: int, slices: int):
    expected = train(job(staleness=staleness))[0].outcome.parameters_sha256
    assert finish(spread(job(num_workers=3, staleness=staleness, slices=slices), [1, 1, 1])) == expected


@pytest.mark.parametrize("name", ["SGD", "Adafactor", "RMSprop"])
def test_other_optimizers_do_not_mind_slices(name: str):
    optimizer = OptimizerConfig(name=name, lr=0.01, weight_decay=0.01)
    by_value = {"optimizer": optimizer, "clip": ClipConfig(value=0.05)}
    expected, report = train(replace(job(), **by_value))
    sliced = spread(replace(job(num_workers=2, slices=3), **by_value), [1, 1, 0])
    assert finish(sliced) == expected.outcome.parameters_sha256
    assert [r.clipped for r in sliced.reports.drain().steps] == [r.clipped for r in report.steps]


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_averaged_weights_are_validated_on_every_host(slices: int, staleness: int):
    averaging = AveragingConfig(decay=0.9)
    expected, report = train(replace(job(staleness=staleness), averaging=averaging))
    run = spread(replace(job(num_workers=3, staleness=staleness, slices=slices), averaging=averaging), [1, 1, 1])
    assert finish(run) == expected.outcome.parameters_sha256
    spread_report = run.reports.drain()
    assert not [event for event in spread_report.events if event.kind == "lost"]
    losses = [[each.metrics["loss"] for each in of.validations] for of in (spread_report, report)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize("slices", [2, 3])
def test_averaged_weights_on_their_way_do_not_set_an_owner_back(slices: int):
    """They may reach one that computes nothing of the validation after it has updated."""
    the_job = replace(job(num_workers=1, slices=slices), averaging=AveragingConfig(decay=0.9))
    expected = train(replace(job(), averaging=the_job.averaging))[0].outcome.parameters_sha256
    run = spread(the_job, [1, *[0] * (slices - 1)])
    send, held = run.hub.send, []

    def holding(link, frame, **how):
        if frame.kind is Kind.PUBLISH and frame.version == 1 and frame.read > 0:
            held.append((frame.read, link, frame, how))
            return
        while frame.kind is Kind.APPLY and held and held[0][0] < frame.step - 1:  # which the owner has made
            _, *late = held.pop(0)
            send(late[0], late[1], **late[2])
            released.append(late)
        send(link, frame, **how)

    released = []
    run.hub.send = holding
    assert finish(run) == expected and released


def in_fp16(the_job: Job) -> Job:
    """With a first scale that overflows for a few steps, which are left out."""
    return replace(the_job, arithmetic=Arithmetic("fp16"), first_loss_scale=TOO_LARGE)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("workers", "slices"), [([1, 2], 2), ([1, 1, 0], 3)])
def test_all_slices_leave_out_what_overflows(staleness: int, workers: list[int], slices: int):
    expected, report = train(in_fp16(job(staleness=staleness)))
    run = spread(in_fp16(job(num_workers=sum(workers), staleness=staleness, slices=slices)), workers)
    assert finish(run) == expected.outcome.parameters_sha256
    steps = run.reports.drain().steps
    assert 2 <= sum(r.overflowed for r in steps) < len(steps)
    assert [r.loss_scale for r in steps] == [r.loss_scale for r in report.steps]


@pytest.mark.parametrize("slices", [2, 3])
def test_gradient_noise_is_the_same_in_slices(on_one_host, slices: int):
    noise = GradientNoiseConfig(eta=0.1)
    expected = train(replace(job(), gradient_noise=noise))[0].outcome.parameters_sha256
    assert finish(spread(replace(job(num_workers=2, slices=slices), gradient_noise=noise), [1, 1, 0])) == expected
    assert expected != on_one_host


def test_a_quorum_over_hosts_takes_every_row_once_an_epoch():
    run = spread(job(num_workers=4, quorum=3, slices=2), [2, 2])
    finish(run)
    report = run.reports.drain()
    assert sum(r.samples for r in report.steps) == 3 * 137


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_worker_of_another_host_costs_no_step_and_no_bit(on_one_host, when: str, slices: int):
    Mortal.deaths, Mortal.died = {2: (5, when)}, []
    run = spread(job(num_workers=4, slices=slices), [1, 2, 1], cls=Mortal)
    assert finish(run) == on_one_host
    assert Mortal.died == [2]
    report = run.reports.drain()
    assert [e.rank for e in report.events if e.kind == "lost"] == [2] and len(report.steps) == 27


class MortalRelay(Relay):
    """The relay of two workers dies at its fifth sum, or soon after: before it sends any of it, half way, or after."""

    when = ""
    died = 0

    def _from_server(self, frame: Frame) -> None:
        if frame.kind is not Kind.COMBINE:
            return super()._from_server(frame)
        self.combined = getattr(self, "combined", 0) + 1
        if self._slice is not None or len(self._workers) < 2 or self.combined < 5:
            return super()._from_server(frame)
        if self.when == "half":
            self._owners[max(self._owners)] = _Nowhere()
        if self.when != "before":
            super()._from_server(frame)
        MortalRelay.died += 1
        for each in self._workers.values():
            each.link.close()
        self._workers.clear()
        raise KilledWorker


class StuckRelay(Relay):
    """The relay of two workers hangs in the step STEP: when it gets the task, or when one of them has pushed and the
    other one does."""

    STEP = 5
    when = ""
    ended = threading.Event()
    stuck = 0

    def _from_server(self, frame: Frame) -> None:
        if self.when == "asked" and not self.stuck and frame.kind is Kind.TRAIN and frame.step == self.STEP:
            self._hang()
        super()._from_server(frame)

    def _from_worker(self, worker: Any, frame: Frame) -> None:
        if self.when == "pushed" and frame.kind is Kind.PUSH and frame.step == self.STEP:
            self.pushes = getattr(self, "pushes", 0) + 1
            if self.pushes == 2:
                self._hang()
        super()._from_worker(worker, frame)

    def _hang(self) -> None:
        StuckRelay.stuck += 1
        self.ended.wait(30)


class SlowWorker(Worker):
    """So slow that the run lasts until who hangs was given up."""

    def handle(self, frame: Frame) -> None:
        time.sleep(0.15)
        super().handle(frame)


@pytest.mark.parametrize("when", ["asked", "pushed"])
def test_a_relay_that_hangs_is_given_up_and_holds_up_nobody(on_one_host, monkeypatch, when: str):
    monkeypatch.setattr("distrain.server.rounds._QUIET_SECONDS", 2.0)
    StuckRelay.when, StuckRelay.stuck, StuckRelay.ended = when, 0, threading.Event()
    run = spread(job(num_workers=3, worker_timeout_s=3.0), [1, 2], relay_cls=StuckRelay, cls=SlowWorker)
    try:
        run.outcome = run.loop.run()
    finally:
        StuckRelay.ended.set()
    assert run.outcome.parameters_sha256 == on_one_host
    report = run.reports.drain()
    assert StuckRelay.stuck == 1 and len(report.steps) == 27
    assert sorted(e.rank for e in report.events if e.kind == "lost") == [1, 2]
    assert [e.kind for e in report.events].count("lost_host") == 1
    if when == "asked":
        assert report.steps[StuckRelay.STEP].step_s < 2.9, "others did what was late"


def test_a_worker_that_hangs_costs_its_host_nothing(on_one_host, monkeypatch):
    class Hanging(SlowWorker):
        def handle(self, frame: Frame) -> None:
            if self.rank == 2 and frame.kind is Kind.TRAIN and frame.step == 5:
                ended.wait(30)
            super().handle(frame)

    monkeypatch.setattr("distrain.server.rounds._QUIET_SECONDS", 2.0)
    ended = threading.Event()
    run = spread(job(num_workers=3, worker_timeout_s=3.0), [1, 2], cls=Hanging)
    try:
        assert finish(run) == on_one_host
    finally:
        ended.set()
    report = run.reports.drain()
    assert [(e.kind, e.rank) for e in report.events if e.kind.startswith("lost")] == [("lost", 2)]
    assert report.steps[-1].workers == 2, "the other one behind the relay works on"


class _Nowhere:
    """A link that takes everything and delivers nothing."""

    sending = shared = False

    def send(self, frame: Frame, *how: Any) -> None:
        pass


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_host_that_dies_costs_no_step_and_no_bit(on_one_host, when: str, slices: int):
    MortalRelay.when, MortalRelay.died = when, 0
    run = spread(job(num_workers=4, slices=slices), [1, 1, 2], relay_cls=MortalRelay)
    assert finish(run) == on_one_host
    assert MortalRelay.died == 1
    report = run.reports.drain()
    assert sorted(e.rank for e in report.events if e.kind == "lost") == [2, 3] and len(report.steps) == 27


class TestAskedAgain:
    """Of two shards, that of the second worker is late at step 6, and the first one computes it too, in its last slot.
    Then what was pushed of it is lost, and the first one is asked again in the same step."""

    STEP = 6

    def job_of(self, **loop) -> Job:
        return replace(job(**loop), train=source(shards=2))

    def finish(self, run: Run) -> None:
        assert finish(run) == train(self.job_of())[0].outcome.parameters_sha256

    def is_it(self, frame: Frame) -> bool:
        return frame.kind in (Kind.TRAIN, Kind.PUSH) and frame.step == self.STEP

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("workers", [[1, 1], [1, 0, 1]])
    def test_for_what_another_host_had_pushed_first(self, workers: list[int]):
        case, asked = self, []
        is_copying, came = threading.Event(), [threading.Event() for _ in range(2)]  # by rank: the server has its push

        class Late(Worker):
            def handle(self, frame: Frame) -> None:
                if case.is_it(frame) and self.rank == 1:
                    is_copying.wait(20)
                elif case.is_it(frame):
                    asked.append((frame.first, frame.stop))
                    if frame.first == 1:
                        is_copying.set()
                        came[1].wait(20)
                super().handle(frame)

        class DyingRelay(Relay):
            def _from_worker(self, worker: Any, frame: Frame) -> None:
                if not case.is_it(frame):
                    return super()._from_worker(worker, frame)
                frame.incarnation = worker.incarnation
                self._hub.send(self._control, frame)
                came[0].wait(20)
                raise KilledWorker

        def take_push(member: Member, frame: Frame) -> None:
            take(member, frame)
            if case.is_it(frame) and frame.first == 1:
                came[member.rank].set()

        run = spread(self.job_of(num_workers=2, slices=len(workers) - 1), workers, Late, DyingRelay)
        take, run.loop._rounds._take_push = run.loop._rounds._take_push, take_push
        self.finish(run)
        assert asked == [(0, 1), (1, 2), (1, 2)]

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("workers", [[0, 2], [0, 0, 2]])
    def test_for_what_it_had_pushed_itself(self, workers: list[int]):
        case, asked, events, is_lost = self, [], [], threading.Event()

        class Late(Worker):
            def handle(self, frame: Frame) -> None:
                if case.is_it(frame) and self.rank == 1:
                    is_lost.wait(20)
                elif case.is_it(frame):
                    asked.append((frame.first, frame.stop))
                super().handle(frame)

        class SlowRelay(Relay):
            def _from_server(self, frame: Frame) -> None:
                if frame.kind is Kind.COMBINE and len(asked) == 2 and not events:  # what it is told to send is there
                    run.loop.give_up(1, "a test")
                    while "lost" not in [event.kind for event in events]:
                        time.sleep(0.01)
                        events.extend(run.reports.drain().events)
                    is_lost.set()
                super()._from_server(frame)

        run = spread(self.job_of(num_workers=2, slices=len(workers) - 1), workers, Late, SlowRelay)
        self.finish(run)
        assert asked == [(0, 1), (1, 2), (0, 2)]


class CutOffRelay(Relay):
    """Loses the server at its fifth sum, as by a reset of its link, and takes that for its own end."""

    def _from_server(self, frame: Frame) -> None:
        self.combined = getattr(self, "combined", 0) + (frame.kind is Kind.COMBINE)
        if self.combined == 5:
            raise LinkError("a test")
        super()._from_server(frame)


class EndedWorker(Worker):
    """Says how it ended: a worker that returns has been told to, and is not replaced."""

    ends: ClassVar[dict[int, str]] = {}

    def run(self) -> None:
        self.ends[self.rank] = "lost its link"
        super().run()
        self.ends[self.rank] = "told to stop"


def test_workers_of_a_relay_that_lost_the_server_know_that_the_run_goes_on(on_one_host):
    EndedWorker.ends = {}
    run = spread(job(num_workers=3), [1, 2], cls=EndedWorker, relay_cls=CutOffRelay)
    assert finish(run) == on_one_host
    assert [EndedWorker.ends[rank] for rank in (1, 2)] == ["lost its link"] * 2


class PartedRelay(Relay):
    """That of the host with this slice, or with none, loses its link to the owner of the first one at its fifth sum."""

    parts: int | None = None
    combined = 0

    def _from_server(self, frame: Frame) -> None:
        if frame.kind is Kind.COMBINE and self._slice == self.parts:
            self.combined += 1
            if self.combined == 5:
                self._owners[0]._socket.shutdown(socket.SHUT_RDWR)
        super()._from_server(frame)


def test_a_host_that_lost_its_link_to_an_owner_is_given_up(on_one_host):
    EndedWorker.ends = {}
    run = spread(job(num_workers=3, slices=2), [1, 0, 2], cls=EndedWorker, relay_cls=PartedRelay)
    assert finish(run) == on_one_host
    lost = [event.message for event in run.reports.drain().events if event.kind == "lost"]
    cause = "its host's relay lost its link to the server of slice 0"
    assert sorted(lost) == [f"worker {rank} was given up: {cause}" for rank in (1, 2)]
    assert [EndedWorker.ends[rank] for rank in (1, 2)] == ["lost its link"] * 2


def test_an_owner_that_lost_its_link_to_another_is_lost(monkeypatch):
    monkeypatch.setattr(PartedRelay, "parts", 1)
    run = spread(job(num_workers=3, slices=3), [1, 1, 1], relay_cls=PartedRelay)
    with pytest.raises(ServerLost, match="slice 1 is lost: its host's relay lost its link to the server of slice 0"):
        run.loop.run()


def test_a_host_may_join_in_the_middle(on_one_host):
    the_job = job(num_workers=2, slices=2)
    run = spread(the_job, [1, 1])

    def join() -> None:
        while run.loop.step < 9:
            time.sleep(0.001)
        run.relays.append(relay := start_relay(run, the_job))
        start_worker(run, the_job, 2, relay=relay)

    late = threading.Thread(target=join, daemon=True)
    late.start()

    assert finish(run) == on_one_host
    late.join(5)


class SilentWorker(Worker):
    """Rank 1 falls silent at step 6."""

    woke = threading.Event()

    def handle(self, frame: Frame) -> None:
        if self.rank == 1 and frame.step == 6:
            self.woke.wait(20)
        super().handle(frame)


def test_a_silent_worker_of_another_host_is_helped_and_given_up(on_one_host):
    SilentWorker.woke.clear()
    run = spread(job(num_workers=2, worker_timeout_s=1.5), [1, 1], cls=SilentWorker)
    threading.Timer(4.0, SilentWorker.woke.set).start()
    assert finish(run) == on_one_host
    assert run.outcome.copied_microbatches >= 2


def test_the_loss_of_a_slice_is_that_of_the_server():
    class Dying(Relay):
        def _apply(self, frame: Frame) -> None:
            if frame.step == 7:
                raise KilledWorker
            super()._apply(frame)

    run = spread(job(num_workers=2, slices=2), [1, 1], relay_cls=Dying)
    with pytest.raises(ServerLost, match="the server of slice 0 is lost"):
        run.loop.run()


def test_a_slice_that_hangs_is_lost_after_the_timeout():
    class Hanging(Relay):
        def _apply(self, frame: Frame) -> None:
            if frame.step == 7:
                time.sleep(1.5)
            super()._apply(frame)

    run = spread(job(num_workers=2, slices=2, worker_timeout_s=0.5), [1, 1], relay_cls=Hanging)
    with pytest.raises(ServerLost, match=r"slice 0 (was silent|is lost)"):
        run.loop.run()


def test_a_slice_that_hangs_is_lost_though_the_hosts_that_wait_for_it_say_that_they_are_there():
    class Hanging(Relay):
        def _take_of_sum(self, frame: Frame) -> None:
            if self._slice is not None and frame.round > 5:
                ended.wait(30)
            super()._take_of_sum(frame)

    ended = threading.Event()
    run = spread(job(num_workers=1, slices=2, worker_timeout_s=1.0), [0, 0, 1], relay_cls=Hanging)
    try:
        with pytest.raises(ServerLost, match="the server of slice 0 was silent for 1 s"):
            run.loop.run()
    finally:
        ended.set()


def test_while_a_slice_hangs_the_run_can_be_ended():
    """As whoever supervises it does, once the slice's node is known to be dead."""

    class Hanging(Relay):
        def _apply(self, frame: Frame) -> None:
            if frame.step == 7:
                threading.Timer(0.1, run.loop.abort, [ServerLost("its node died")]).start()
                ended.wait(10)
            super()._apply(frame)

    ended = threading.Event()
    run = spread(job(num_workers=2, slices=2), [1, 1], relay_cls=Hanging)
    start = time.monotonic()
    with pytest.raises(ServerLost, match="its node died"):
        run.loop.run()
    ended.set()
    assert time.monotonic() - start < 8


class TestSilence:
    """What counts is since when nothing moves, not how long a large transfer takes."""

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("distrain.server.hosts.time", Mock(monotonic=lambda: self.now))

    def welcomed(self, slices: int = 2) -> tuple[Run, list[Host]]:
        """A run with a relay for each other slice, and one more."""
        run = open_run(job(slices=slices, worker_timeout_s=60.0))
        hello = {"relay": True, "launch": 0, "tcp": None, "layout": run.server.layout.digest}
        links = [Mock(shared=False, sending=False, moved_at=self.now) for _ in range(slices)]
        hosts = [
            run.loop._hosts.welcome(link, {**hello, "slice": slice_})
            for slice_, link in zip([*range(slices - 1), None], links, strict=True)
        ]
        return run, hosts

    def test_a_state_may_take_longer_than_the_timeout(self):
        run, [owner, _] = self.welcomed()
        waits = 0

        def poll(timeout_s: float) -> list:
            nonlocal waits
            waits += 1
            self.now += 15.0
            owner.link.moved_at = self.now
            return [(owner.link, Frame(Kind.STATE, payload=b"all of it"))] if waits == 10 else []

        run.hub.poll = poll
        run.loop._hosts._await(lambda each: each.state is not None)
        assert waits == 10 and owner.state == b"all of it"
        run.hub.close()

    def test_an_owner_that_sends_nothing_is_lost(self):
        def poll(timeout_s: float) -> list:
            self.now += 15.0
            return []

        run, _ = self.welcomed()
        run.hub.poll = poll
        with pytest.raises(ServerLost, match="the server of slice 0 was silent for 60 s"):
            run.loop._hosts._await(lambda each: each.state is not None)
        assert self.now == 75.0
        run.hub.close()

    def owing(self, *lacking: int, moved_ago_s: float = 90.0) -> tuple[Run, Host]:
        """A host without a slice, whose sums these owners lack for a while; the server's is slice 2."""
        run, [*_, host] = self.welcomed(slices=3)
        host.batches[0] = [Batch([], self.now, dict.fromkeys(lacking, 4))]
        self.now += 90.0
        host.link.moved_at = self.now - moved_ago_s
        return run, host

    @pytest.mark.parametrize("lacking", [(0, 1, 2), (2,), (0, 2)])
    def test_a_host_whose_sums_the_server_lacks_is_given_up(self, lacking: tuple[int, ...]):
        run, host = self.owing(*lacking)
        assert run.loop._hosts.overdue() is host.link
        run.hub.close()

    def test_but_not_while_they_come(self):
        run, _ = self.owing(0, 1, 2, moved_ago_s=45.0)
        assert run.loop._hosts.overdue() is None
        run.hub.close()

    @pytest.mark.parametrize("lacking", [(1,), (0, 1)])
    def test_an_owner_that_does_not_take_what_the_server_has_is_lost(self, lacking: tuple[int, ...]):
        run, _ = self.owing(*lacking)
        with pytest.raises(ServerLost, match=f"the server of slice {lacking[0]} was silent"):
            run.loop._hosts.overdue()
        run.hub.close()

    def test_nor_one_that_does_not_take_the_servers_own(self):
        run, _ = self.owing()
        hosts = run.loop._hosts
        hosts.local.batches[0] = [Batch([], self.now - 90.0, {1: 4})]
        hosts._by_number = {0: hosts.local}
        with pytest.raises(ServerLost, match="the server of slice 1 was silent"):
            hosts.overdue()
        run.hub.close()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "noisy average"])
def test_stopped_and_resumed_at_another_number_of_slices(before: int, after: int, staleness: int, kind: str):
    def job_of(**loop) -> Job:  # a plateau would look at the validation with which `max_steps` ends
        made = replace(job(staleness=staleness, **loop), schedule=ScheduleConfig(name="CosineAnnealingLR", T_max=20))
        if kind == "noisy average":
            return replace(made, averaging=AveragingConfig(decay=0.9), gradient_noise=GradientNoiseConfig(eta=0.1))
        return in_fp16(made) if kind == "fp16" else made

    expected = train(job_of())[0].outcome.parameters_sha256
    first = spread(job_of(max_steps=13, num_workers=2, slices=before), [1, 1, 0])
    finish(first)
    assert resumed(last_snapshot(first), job_of(num_workers=2, slices=after)) == expected


def last_snapshot(run: Run) -> Snapshot:
    run.reports.drain()
    *_, last = iter(run.reports.take_snapshot, None)
    return last


def resumed(snapshot: Snapshot, the_job: Job, **state: Any) -> str:
    """Go on from a snapshot, on two hosts or as many as there are slices."""
    run = open_run(the_job)
    run.loop.restore(13, load(snapshot.model), {**snapshot.state, **state}, load(snapshot.optimizer))
    run.relays = [start_relay(run, the_job, s) for s in range(the_job.loop.slices - 1)] or [start_relay(run, the_job)]
    start_worker(run, the_job, 0)
    start_worker(run, the_job, 1, relay=run.relays[0])
    return finish(run)


def test_where_updates_and_the_plans_steps_differ_slices_round_as_one_server_does():
    """As after a resume with other rows, which begins the epoch anew."""

    def job_of(**loop) -> Job:
        made = replace(job(num_workers=2, **loop), schedule=ScheduleConfig(name="CosineAnnealingLR", T_max=20))
        return replace(made, options=WorkerOptions(wire_dtype="bf16"))

    first = spread(job_of(max_steps=13), [1, 1])
    finish(first)
    snapshot = last_snapshot(first)
    one, two, three = (resumed(snapshot, job_of(slices=slices), agenda={"epoch": 1}) for slices in (1, 2, 3))
    assert one == two == three


def test_a_diverging_run_ends_on_every_host():
    the_job = replace(job(num_workers=2, slices=2), optimizer=OptimizerConfig(name="SGD", lr=1e30))
    run = spread(the_job, [1, 1])
    with pytest.raises(DivergenceError):
        run.loop.run()
    run.relays[1].thread.join(10)
    assert not run.relays[1].thread.is_alive()


def test_more_slices_than_tensors_are_refused():
    the_job = replace(job(slices=3), task=task({"hidden": []}))
    assert the_job.task.model == ModelConfig(hidden=[])
    with pytest.raises(ValueError, match="2 parameter tensors cannot be cut into 3 slices"):
        open_run(the_job)
