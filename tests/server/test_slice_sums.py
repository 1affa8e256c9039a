"""Hosts' sums over a slice are added up as they come, and the update is that of adding them up at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distrain.config import ClipConfig, OptimizerConfig
from distrain.exchange.layout import Span
from distrain.exchange.link import Frame, Kind
from distrain.exchange.slices import cut
from distrain.exchange.sums import Key, open_frame, piece_frame, sum_frame
from distrain.reduction import Block, Partial, TreeSum
from distrain.server.parameter_server import Gathered, ParameterServer
from distrain.server.slice_sums import SliceSums

OWN = 0  # host


@pytest.fixture(scope="module", autouse=True)
def small_pieces_and_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.exchange.layout.PIECE_FLOATS", 48)
        patch.setattr("distrain.server.parameter_server.CHUNK_FLOATS", 64)
        yield


def owner(wire_dtype: str = "fp32") -> ParameterServer:
    """Of the second of two slices, with the model's buffers."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 9) for _ in range(6)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(9))
    probe = ParameterServer(model, OptimizerConfig(name="SGD", lr=0.1))
    made = ParameterServer(
        model,
        OptimizerConfig(name="SGD", lr=0.1),
        clip=ClipConfig(norm=0.1),
        span=cut(probe.layout, 2)[1],
        wire_dtype=wire_dtype,  # type: ignore[arg-type]
    )
    made.share = lambda values: values
    assert len(made.chunks) > 3
    return made


@dataclass(frozen=True)
class Sum:
    """A host's sum over a block, with values of its own."""

    host: int
    number: int
    block: Block
    seed: int
    round: int = 3
    step: int = 2
    count: int = 4

    @property
    def key(self) -> Key:
        return self.host, self.number

    def values(self, server: ParameterServer) -> Tensor:
        """Gradients that bf16 holds, and changes of buffers."""
        generator = torch.Generator().manual_seed(self.seed)
        found = torch.randint(-9, 10, (len(server.span),), generator=generator) / 8
        whole = max(0, server.layout.num_gradients - server.span.start)
        found[whole:] = self.block.stop - self.block.first
        return found

    @property
    def part(self) -> Partial:
        places = self.block.stop - self.block.first
        return Partial(None, places, 0.5 * places, 2.0 * places, squares=float(self.seed))


class Owner:
    """A slice's owner, who is sent frames."""

    def __init__(self, wire_dtype: str = "fp32", is_ahead: bool = True) -> None:
        self.server = owner(wire_dtype)
        self.sums = SliceSums(self.server, is_ahead)
        self.own: dict[Key, Tensor] = {}
        self.pieces = list(self.server.layout.pieces(self.server.span))

    def open(self, sum_: Sum) -> None:
        frame = open_frame(sum_.round, sum_.step, sum_.count, sum_.host, sum_.number, sum_.block)
        if sum_.host == OWN:
            self.own[sum_.key] = torch.full([len(self.server.span)], torch.nan)  # until it is there
        self.sums.take(frame, self.own.get(sum_.key))

    def send(self, sum_: Sum, piece: Span) -> None:
        values, start = sum_.values(self.server), self.server.span.start
        frame = piece_frame(sum_.round, *sum_.key, piece)
        if sum_.host == OWN:
            place = slice(piece.start - start, piece.stop - start)
            self.own[sum_.key][place] = values[place]
        else:
            whole = torch.zeros(self.server.layout.num_floats)
            whole[start : start + len(values)] = values
            frame.payload = self.sums.place(frame)
            frame.payload[:] = memoryview(self.server.wire.pack_sum(whole, piece)).cast("B")
        self.sums.take(frame)

    def finish(self, sum_: Sum) -> None:
        self.sums.take(sum_frame(sum_.round, *sum_.key, sum_.block, 77, sum_.part))

    def void(self, sum_: Sum) -> None:
        self.sums.take(Frame(Kind.VOID, slot=sum_.host, version=sum_.number))

    def gather(self, sums: list[Sum]) -> Gathered:
        return self.sums.gather(sums[0].round, sums[0].step, sums[0].count, [sum_.key for sum_ in sums])

    def forget(self, round_: int) -> None:
        self.sums.forget(lambda number: number <= round_)


def expected(sums: list[Sum], server: ParameterServer, step: int | None = None) -> Gathered:
    """All of it at the end."""
    tree = TreeSum(sums[0].count, server.wire.rounding(step or sums[0].step, server.span.start))
    for sum_ in sums:
        part = sum_.part
        part.vector = sum_.values(server)
        tree.put(sum_.block, part)
    return Gathered(tree.halves(), tree.late)


@st.composite
def tiles(draw: st.DrawFn, round_: int, numbers: Iterator[int]) -> list[Sum]:
    """Sums that make up a round of some places."""
    count = draw(st.integers(1, 6))
    blocks = [Block(i, i + 1) for i in range(count)]
    for _ in range(draw(st.integers(0, count - 1))):
        able = [i for i in range(len(blocks) - 1) if blocks[i].joins(blocks[i + 1], count)]
        if able:
            i = draw(st.sampled_from(able))
            blocks[i : i + 2] = [Block(blocks[i].first, blocks[i + 1].stop)]
    return [
        Sum(draw(st.integers(OWN, 2)), (number := next(numbers)), block, number, round_, 2 + round_, count)
        for block in blocks
    ]


@settings(deadline=None)
@given(data=st.data())
def test_however_sums_come_the_update_has_the_same_bits(data: st.DataObject):
    """Sums of two rounds, those of a host in its own order; some are begun and void, and some come twice."""
    wire_dtype = data.draw(st.sampled_from(["fp32", "bf16"]))
    one, other = Owner(wire_dtype), owner(wire_dtype)
    numbers = iter(range(1000))
    rounds = [data.draw(tiles(round_, numbers)) for round_ in range(2)]
    by_host: dict[int, list[tuple[str, Sum, Span | None]]] = {host: [] for host in range(3)}
    for sums in rounds:
        for sum_ in sums:
            todo = by_host[sum_.host]
            if data.draw(st.booleans()):  # more than counts
                void = Sum(sum_.host, next(numbers), sum_.block, 99, sum_.round, sum_.step, sum_.count)
                begun = data.draw(st.integers(0, len(one.pieces)))
                todo += [("open", void, None), *(("send", void, piece) for piece in one.pieces[:begun])]
                todo.append(("void" if data.draw(st.booleans()) or begun < len(one.pieces) else "finish", void, None))
            todo += [("open", sum_, None), *(("send", sum_, piece) for piece in one.pieces), ("finish", sum_, None)]
    waiting = [{sum_.key for sum_ in sums} for sums in rounds]
    applied = 0
    while applied < 2:
        if not waiting[applied] and (not any(by_host.values()) or data.draw(st.booleans())):
            gathered = one.gather(rounds[applied])
            ours = one.server.apply(gathered, applied + 1)
            theirs = other.apply(expected(rounds[applied], other), applied + 1)
            one.forget(applied)
            assert (ours.loss, ours.grad_norm, ours.samples) == (theirs.loss, theirs.grad_norm, theirs.samples)
            assert torch.equal(one.server.current.floats, other.current.floats)
            assert torch.equal(one.server.current.ints, other.current.ints)
            applied += 1
            continue
        host = data.draw(st.sampled_from([host for host, todo in by_host.items() if todo]))
        what, sum_, piece = by_host[host].pop(0)
        if piece is not None:
            one.send(sum_, piece)
        else:
            getattr(one, what)(sum_)
        if what == "finish":
            for keys in waiting:
                keys.discard(sum_.key)
    for todo in by_host.values():  # late
        for what, sum_, piece in todo:
            one.send(sum_, piece) if piece is not None else getattr(one, what)(sum_)
    one.forget(2)
    assert not one.sums._ahead and not one.sums._whole and one.sums._gathered is None


SUMS = [Sum(0, 5, Block(0, 1), 1), Sum(1, 5, Block(1, 2), 2), Sum(2, 7, Block(2, 4), 3)]


def test_when_the_last_piece_has_come_nothing_is_left_to_add_up():
    one = Owner()
    for sum_ in SUMS:
        one.open(sum_)
    [ahead] = one.sums._ahead.values()
    for place, piece in enumerate(one.pieces):
        for sum_ in SUMS:
            assert len(ahead.written) < len(one.server.chunks) * (place + 1) / len(one.pieces)
            one.send(sum_, piece)
    assert ahead.written == set(range(len(one.server.chunks)))
    for sum_ in SUMS:
        one.finish(sum_)
    assert one.gather(SUMS).is_written


def test_what_came_while_another_round_was_applied_is_added_up_after_it():
    one = Owner()
    told: list[tuple[int, int, set[Key]]] = []
    one.sums = SliceSums(one.server, is_ahead=True, done=lambda *what: told.append((*what[:2], set(what[2]))))
    later = [Sum(s.host, s.number + 10, s.block, s.seed + 10, round=4, step=3) for s in SUMS]
    for sums in (SUMS, later):
        for sum_ in sums:
            one.open(sum_)
            for piece in one.pieces:
                one.send(sum_, piece)
            one.finish(sum_)
    assert told == [(3, 2, {sum_.key for sum_ in SUMS})]
    one.server.apply(one.gather(SUMS), 1)
    one.forget(3)
    assert told[1:] == [(4, 3, {sum_.key for sum_ in later})]


@pytest.mark.parametrize("step", [2, 9])
def test_sums_for_another_step_than_said_are_added_up_anew(step: int):
    """Which bf16 rounds otherwise."""
    one, other = Owner("bf16"), owner("bf16")
    for sum_ in SUMS:
        one.open(sum_)
        for piece in one.pieces:
            one.send(sum_, piece)
        one.finish(sum_)
    gathered = one.sums.gather(3, step, 4, [sum_.key for sum_ in SUMS])
    assert gathered.is_written == (step == SUMS[0].step)
    one.server.apply(gathered, 1)
    other.apply(expected(SUMS, other, step), 1)
    assert torch.equal(one.server.current.floats, other.current.floats)


def test_what_came_whole_before_the_others_began_is_added_up_too():
    one = Owner()
    for sum_ in SUMS:
        one.open(sum_)
        for piece in one.pieces:
            one.send(sum_, piece)
        one.finish(sum_)
    assert one.gather(SUMS).is_written


@pytest.mark.parametrize("how", ["void", "lose"])
def test_a_sum_that_does_not_come_costs_nothing_but_what_was_added_up(how: str):
    one = Owner()
    for sum_ in SUMS:
        one.open(sum_)
    for sum_ in SUMS[:2]:
        for piece in one.pieces:
            one.send(sum_, piece)
        one.finish(sum_)
    one.send(SUMS[2], one.pieces[0])
    assert one.sums._ahead
    one.void(SUMS[2]) if how == "void" else one.sums.lose(SUMS[2].host)
    assert not one.sums._ahead
    again = Sum(1, 6, Block(2, 4), 4)
    one.open(again)
    for piece in one.pieces:
        one.send(again, piece)
    one.finish(again)
    sums = [*SUMS[:2], again]
    gathered = one.gather(sums)
    assert gathered.is_written
    other = owner()
    one.server.apply(gathered, 1)
    other.apply(expected(sums, other), 1)
    assert torch.equal(one.server.current.floats, other.current.floats)


def test_while_a_round_is_applied_no_other_is_written():
    one = Owner()
    later = [Sum(s.host, s.number + 10, s.block, s.seed + 10, round=4, step=3) for s in SUMS]
    for sum_ in SUMS:
        one.open(sum_)
        for piece in one.pieces:
            one.send(sum_, piece)
        one.finish(sum_)
    gathered, other = one.gather(SUMS), owner()

    def meanwhile(values: list[float]) -> list[float]:
        one.server.share = lambda values: values
        for sum_ in later:
            one.open(sum_)
            for piece in one.pieces:
                one.send(sum_, piece)
            one.finish(sum_)
        return values

    one.server.share = meanwhile
    one.server.apply(gathered, 1)
    one.forget(3)
    other.apply(expected(SUMS, other), 1)
    assert torch.equal(one.server.current.floats, other.current.floats)
    one.server.apply(one.gather(later), 2)
    other.apply(expected(later, other), 2)
    assert torch.equal(one.server.current.floats, other.current.floats)


def test_where_pushes_count_that_no_host_adds_up_nothing_is_added_up_ahead():
    one = Owner(is_ahead=False)
    for sum_ in SUMS:
        one.open(sum_)
    assert not one.sums._ahead
