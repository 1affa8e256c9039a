"""What the workers of one host push, added up there, so that one sum a step goes from it to the owner of each slice.

A sum begins as soon as all that the host's workers owe of a round is at least under way, and goes out piece by piece as
they say that pieces are ready. It is of whatever they push, before the server has said what of that counts, since its
word may be long on its way; it hardly ever says anything else. Where it does, the sum is void, or not asked for, and
another one is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distrain.exchange.layout import Layout, Span, overlaps
from distrain.exchange.link import Frame, Hub, Kind, SocketLink, rows_digest
from distrain.exchange.memory import PushSlots
from distrain.exchange.slices import cut
from distrain.exchange.sums import open_frame, partial_of, piece_frame, send_piece, sum_frame
from distrain.exchange.wire import Wire
from distrain.reduction import Block, Planned, TreeSum

_REMEMBERED = 8  # rounds whose pushes are kept, beyond those in flight

Row = tuple[int, ...]
"""A push: (incarnation, number of its slot, first place, stop)."""

Keep = Callable[[Frame, Tensor | None], None]
"""Takes what is said of a sum over the slice that the host itself owns. Pieces have no payload: the float32 values are
where the frame that opens the sum comes with them."""


@dataclass(eq=False)
class _Sum:
    """A sum under way, of pushes. Its nodes are numbered, since there may be several that do not merge."""

    planned: Planned[Row]
    numbers: list[int]
    lacking: dict[Row, dict[Span, int]]  # values of each piece that are not computed yet, where there are any
    unsent: set[Span]  # pieces


@dataclass(eq=False)
class _Work:
    """What the workers of this host do in a round of `count` places."""

    step: int
    count: int
    slots: int  # the set of push slots that it uses
    owed: dict[tuple[int, int], int] = field(default_factory=dict)  # (incarnation, first place) -> stop
    said: dict[Row, Frame] = field(default_factory=dict)  # the pushes
    ready: dict[Row, list[Span]] = field(default_factory=dict)  # pushes to come, as far as they are computed
    waiting: set[Row] = field(default_factory=set)  # pushes that no sum was made of
    ahead: list[frozenset[Row]] = field(default_factory=list)  # pushes of the sums that were finished
    sum: _Sum | None = None
    is_over: bool = False
    memory: list[memoryview] = field(default_factory=list)  # of sums

    def is_new(self, row: Row) -> bool:
        """Whether no sum was finished of these places: what a helper pushes late is not asked for."""
        return all(row[3] <= first or stop <= row[2] for done in self.ahead for _, _, first, stop in done)

    @property
    def is_all_under_way(self) -> bool:
        """Whether of all that is owed something is there, and no place comes twice, from a worker and its helper."""
        begun = self.waiting | self.ready.keys()
        for (incarnation, first), stop in self.owed.items():
            blocks = [(a, b) for i, _, a, b in begun if i == incarnation and first <= a and b <= stop]
            if sum(b - a for a, b in blocks) < stop - first:
                return False
        ordered = sorted(row[2:] for row in begun)
        return bool(begun) and all(stop <= first for (_, stop), (first, _) in itertools.pairwise(ordered))


class HostSums:
    """The sums of one host, whose `number` is set before the first. `links` lead to the owners of slices, but for the
    slice `own`, whose sums are told to `keep`. There are `num_sets` sets of push slots."""

    def __init__(
        self,
        layout: Layout,
        wire: Wire,
        hub: Hub,
        num_slices: int,
        own: int | None,
        links: Mapping[int, SocketLink],
        keep: Keep,
        num_sets: int = 1,
    ) -> None:
        self.number, self.num_sets = 0, num_sets
        self._layout, self._wire, self._hub, self._own, self._links, self._keep = layout, wire, hub, own, links, keep
        spans = cut(layout, num_slices)
        self._own_span = spans[own] if own is not None else None
        # Of one bucket each, so that no piece waits for gradients of two depths of the model.
        by_slice = [
            [(piece, slice_) for part in layout.parts(span) for piece in layout.pieces(part)]
            for slice_, span in enumerate(spans)
        ]
        rows = itertools.zip_longest(*by_slice)  # so that all owners get their first pieces first
        self._pieces: dict[Span, int] = dict(each for row in rows for each in row if each is not None)
        self._from_left = sorted(self._pieces, key=lambda piece: piece.start)
        self._slots: dict[int, PushSlots] = {}  # by incarnation
        self._gone: dict[int, int] = {}  # incarnation -> the newest round when it went
        self._work: dict[int, _Work] = {}  # by round
        self._numbers = itertools.count()

    def joined(self, incarnation: int, slots: PushSlots) -> None:
        """A worker of this host was taken in."""
        self._slots[incarnation] = slots

    def left(self, incarnation: int) -> None:
        """A worker is gone: what it has not pushed will not come. Its slots stay for as long as what it has may be
        wanted."""
        self._gone[incarnation] = max(self._work, default=0)
        for work in self._work.values():
            work.owed = {key: stop for key, stop in work.owed.items() if key[0] != incarnation}
            work.ready = {row: spans for row, spans in work.ready.items() if row[0] != incarnation}
            if work.sum is not None and any(
                row[0] == incarnation and row not in work.said for row in work.sum.planned.parts
            ):
                self._void(work)

    def asked(self, task: Frame) -> None:
        """A worker owes gradients."""
        if task.round not in self._work:
            for over in [work for work in self._work.values() if work.slots == task.slot]:
                self._end(over)  # since its slots are free
            self._work[task.round] = _Work(task.step, task.samples, task.slot)
            while len(self._work) > self.num_sets + _REMEMBERED:
                self._end(self._work.pop(min(self._work)))
        work = self._work[task.round]
        self._forget(work, task)
        work.owed[task.incarnation, task.first] = task.stop

    def _forget(self, work: _Work, task: Frame) -> None:
        """What a worker is asked for again did not count when it pushed it, or is lost, and its slots are free."""
        known = [row for row in work.said.keys() | work.ready.keys() if row[0] == task.incarnation]
        again = {row for row in known if row[2] < task.stop and task.first < row[3]}
        if work.sum is not None and not again.isdisjoint(work.sum.planned.parts):
            self._void(work)
        for row in again:
            work.said.pop(row, None)
            work.ready.pop(row, None)
        work.waiting -= again

    def ready(self, frame: Frame) -> None:
        """Some of a push is there."""
        work, row, span = self._work.get(frame.round), _row(frame), Span(frame.read, frame.samples)
        if work is None or work.is_over or not work.is_new(row):
            return
        work.ready.setdefault(row, []).append(span)
        if work.sum is None:
            if work.is_all_under_way:
                self._begin(frame.round, work, work.waiting | work.ready.keys())
        elif row in work.sum.planned.parts:
            self._advance(frame.round, work.sum, row, span)

    def pushed(self, frame: Frame) -> None:
        """A push is there."""
        work, row = self._work.get(frame.round), _row(frame)
        if work is None or work.is_over:
            return
        work.said[row] = frame
        work.ready.pop(row, None)
        if work.sum is not None and row in work.sum.lacking:
            work.sum.lacking[row].clear()
            self._send_whole(frame.round, work.sum, self._pieces)
        for (incarnation, first), stop in list(work.owed.items()):
            if incarnation == frame.incarnation and stop == frame.stop:
                del work.owed[incarnation, first]
        if not work.is_new(row):
            return
        work.waiting.add(row)
        if not work.owed and work.is_all_under_way and not work.ready:
            self._finish(frame.round, work, frozenset(work.waiting))

    def combine(self, round_: int, rows: Iterable[Row]) -> None:
        """The server says which pushes count. Sums that were made of others as well are not asked for."""
        work, wanted = self._work[round_], frozenset(rows)
        for done in work.ahead:
            wanted -= done if done <= wanted else frozenset()
        if wanted:
            self._finish(round_, work, wanted)
        for incarnation in [i for i, newest in self._gone.items() if newest + self.num_sets < round_]:
            del self._gone[incarnation], self._slots[incarnation]

    def _begin(self, round_: int, work: _Work, rows: Iterable[Row]) -> _Sum:
        """Begin a sum of these pushes, and send what is there of it."""

        def fresh() -> Tensor:
            work.memory.append(self._wire.pool.take(self._layout.vector_bytes))
            return torch.frombuffer(work.memory[-1], dtype=torch.float32)

        tree = TreeSum(work.count, self._wire.rounding(work.step), fresh)
        ordered = sorted(rows, key=lambda row: row[2])
        planned = tree.plan_all((row, Block(*row[2:]), self._slots[row[0]][row[1]]) for row in ordered)
        numbers = [next(self._numbers) for _ in planned.nodes]
        lacking = {row: {p: len(p) for p in self._pieces} if row not in work.said else {} for row in ordered}
        work.sum = _Sum(planned, numbers, lacking, set(self._pieces))
        for number, (block, part) in zip(numbers, planned.nodes, strict=True):
            self._tell(open_frame(round_, work.step, work.count, self.number, number, block), part.vector)
        for row in ordered:
            for span in work.ready.get(row, []):
                self._advance(round_, work.sum, row, span)
        return work.sum

    def _advance(self, round_: int, sum_: _Sum, row: Row, span: Span) -> None:
        """More is there of a push: send the pieces that lack nothing any more."""
        for place, num_values in overlaps(self._from_left, span):
            piece = self._from_left[place]
            assert piece in sum_.lacking[row], "a value is told READY once"
            sum_.lacking[row][piece] -= num_values
            if not sum_.lacking[row][piece]:
                del sum_.lacking[row][piece]
                self._send_whole(round_, sum_, [piece])

    def _send_whole(self, round_: int, sum_: _Sum, candidates: Iterable[Span]) -> None:
        for piece in candidates:
            if piece in sum_.unsent and not any(piece in lacking for lacking in sum_.lacking.values()):
                self._send(round_, sum_, piece)

    def _send(self, round_: int, sum_: _Sum, piece: Span) -> None:
        """Add up a piece, and send it to its owner."""
        sum_.unsent.remove(piece)
        sum_.planned.add(slice(piece.start, piece.stop))
        slice_ = self._pieces[piece]
        for number, (_, part) in zip(sum_.numbers, sum_.planned.nodes, strict=True):
            if slice_ == self._own:
                self._keep(piece_frame(round_, self.number, number, piece), None)
            else:
                link = self._links[slice_]
                send_piece(self._hub, self._wire, round_, self.number, number, part.vector, piece, link)

    def _finish(self, round_: int, work: _Work, rows: frozenset[Row]) -> None:
        """Have the owners know a sum of these pushes, all of which are there."""
        if work.sum is not None and work.sum.planned.parts.keys() != rows:
            self._void(work)
        sum_ = work.sum or self._begin(round_, work, rows)
        sum_.lacking.clear()
        self._send_whole(round_, sum_, self._pieces)
        sum_.planned.add_numbers({row: partial_of(work.said[row]) for row in rows})
        for number, (block, part) in zip(sum_.numbers, sum_.planned.nodes, strict=True):
            digest = rows_digest(row for row in rows if block.first <= row[2] < block.stop)
            self._tell(sum_frame(round_, self.number, number, block, digest, part))
        work.sum = None
        work.ahead.append(rows)
        work.waiting -= rows

    def _void(self, work: _Work) -> None:
        """The sum under way will not be finished."""
        numbers = work.sum.numbers if work.sum is not None else []
        work.sum = None
        for link in self._links.values() if numbers else ():
            link.withdraw(lambda frame: frame.kind is Kind.PIECE and frame.version in numbers)
        for number in numbers:
            self._tell(Frame(Kind.VOID, slot=self.number, version=number))

    def _tell(self, what: Frame, vector: Tensor | None = None) -> None:
        """Say something of a sum, whose values over the whole vector are these, to the owners of all slices."""
        for link in self._links.values():
            self._hub.send(link, what, bulk=True)
        if self._own_span is not None:
            own = vector[self._own_span.start : self._own_span.stop] if vector is not None else None
            self._keep(what, own)

    def _end(self, work: _Work) -> None:
        """A round is over."""
        work.is_over = True
        self._void(work)
        while work.memory:
            self._wire.pool.give(work.memory.pop())


def _row(frame: Frame) -> Row:
    return frame.incarnation, frame.slot, frame.first, frame.stop
