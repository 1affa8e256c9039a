"""The hosts' sums over the slice of one parameter server, added up as they come.

As soon as all that hosts have begun makes up a round, what is there from each of them is added up, chunk by chunk, and
so are the squares of its norm: when the last piece has come, little is left to do. This is ahead of the word which sums
count, since that takes its time, and hardly ever says anything else. Where it does, nothing is lost: what has come is
left as it is, and added up anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distrain.exchange.layout import Span, overlaps
from distrain.exchange.link import Frame, Kind
from distrain.exchange.sums import Coming, Incoming, Key, partial_of
from distrain.reduction import Partial, Planned, TreeSum
from distrain.server.parameter_server import Gathered, ParameterServer

_FLOAT_BYTES = 4

Done = Callable[[int, int, Collection[Key], list[float]], None]
"""Told that these sums of a round are added up, for a step of the plan, and the squares of the norm's pieces."""


@dataclass(eq=False)
class _Ahead:
    """A round that is added up while it comes. `lacking` counts the values of each chunk, of all parts together, that
    have not come; then it is `ready`, until it is `written`. `unfinished` parts are not yet said to be whole."""

    step: int
    planned: Planned[Key]
    halves: tuple[Partial, ...]
    memory: list[memoryview]
    lacking: list[int]
    unfinished: set[Key]
    ready: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


class SliceSums:
    """Takes what hosts say of their sums over the slice of `server`, and has that add them up: ahead of the update,
    where all that it takes comes from hosts (`is_ahead`). `done` is told when that is done."""

    def __init__(self, server: ParameterServer, is_ahead: bool, done: Done | None = None) -> None:
        self._server, self._wire, self._span, self._is_ahead = server, server.wire, server.span, is_ahead
        self._done = done
        self._chunks = [Span(chunk.start, chunk.stop) for chunk in server.chunks]
        self._incoming = Incoming(self._wire, self._span)
        self._whole: dict[int, dict[Key, tuple[Coming, Partial]]] = {}  # by round
        self._ahead: dict[int, _Ahead] = {}  # by round
        self._holder: int | None = None  # the round of which chunks were written: one at a time
        self._gathered: tuple[int, list[memoryview]] | None = None  # the round that is applied, and its memory

    def place(self, piece: Frame) -> memoryview:
        """Where a piece's payload goes."""
        return self._incoming.place(piece)

    def take(self, what: Frame, vector: Tensor | None = None) -> None:
        """A host says something of a sum. `vector` holds its values where it is the owner's own that opens one."""
        key = what.slot, what.version
        match what.kind:
            case Kind.OPEN:
                self._incoming.open(what, vector)
                if self._is_ahead and what.round not in self._ahead:
                    self._look_ahead(what)
            case Kind.PIECE:
                span, ahead = self._incoming.take(what), self._ahead.get(what.round)
                if ahead is not None and key in ahead.planned.parts:
                    self._came(ahead, span)
                    self._go_on(what.round)
            case Kind.SUM:
                coming = self._incoming.whole(what)
                part = replace(partial_of(what), vector=coming.vector)
                self._whole.setdefault(what.round, {})[key] = coming, part
                if (ahead := self._ahead.get(what.round)) is not None and key in ahead.unfinished:
                    ahead.unfinished.remove(key)
                    self._go_on(what.round)
            case Kind.VOID:
                self._leave(key)
                self._incoming.drop(what)
            case _:
                raise AssertionError(what.kind)

    def lose(self, host: int) -> None:
        """A host is gone, with what it has not sent."""
        for key in self._incoming.lose(host):
            self._leave(key)

    def part(self, round_: int, key: Key) -> Partial:
        """A sum that is whole."""
        return self._whole[round_][key][1]

    def gather(self, round_: int, step: int, count: int, keys: Collection[Key]) -> Gathered:
        """What these sums, which are whole, add up to, of a round of `count` places and the plan's `step`. It is to be
        applied, and then to be forgotten, before another one is gathered."""
        ahead = self._ahead.pop(round_, None)
        if self._holder is not None and self._holder != round_:
            other = self._ahead[self._holder]
            other.ready, other.written = other.ready | other.written, set()
        self._holder = None
        self._gathered = round_, ahead.memory if ahead is not None else []
        found = {key: self._whole[round_][key] for key in keys}
        if ahead is None or ahead.step != step or ahead.planned.parts.keys() != found.keys():
            tree = TreeSum(count, self._wire.rounding(step, self._span.start))
            for coming, part in found.values():
                tree.put(coming.block, part)
            return Gathered(tree.halves(), tree.late)
        ahead.planned.add_numbers({key: said for key, (_, said) in found.items()})
        self._write(ahead)
        assert len(ahead.written) == len(ahead.lacking)
        return Gathered(ahead.halves, is_written=True)

    def forget(self, is_over: Callable[[int], bool]) -> None:
        """These rounds are applied, or never will be."""
        for round_ in [round_ for round_ in self._whole if is_over(round_)]:
            for coming, _ in self._whole.pop(round_).values():
                self._incoming.give_back(coming)
        for round_ in [round_ for round_ in self._ahead if is_over(round_)]:
            self._end(round_)
        if self._gathered is not None and is_over(self._gathered[0]):
            self._give_back(self._gathered[1])
            self._gathered = None
            if self._ahead:
                self._go_on(min(self._ahead))

    def _look_ahead(self, what: Frame) -> None:
        """Begin to add a round up, where sums of all its places have begun, each place once."""
        whole = self._whole.get(what.round, {})
        found = self._incoming.of(what.round) | {key: coming for key, (coming, _) in whole.items()}
        ordered = sorted(found.items(), key=lambda each: each[1].block)
        ends = [0, *(coming.block.stop for _, coming in ordered)]
        if ends[-1] != what.samples or any(
            coming.block.first != stop for (_, coming), stop in zip(ordered, ends, strict=False)
        ):
            return
        memory: list[memoryview] = []

        def fresh() -> Tensor:
            memory.append(self._wire.pool.take(_FLOAT_BYTES * len(self._span)))
            return torch.frombuffer(memory[-1], dtype=torch.float32)

        tree = TreeSum(what.samples, self._wire.rounding(what.step, self._span.start), fresh)
        planned = tree.plan_all((key, coming.block, coming.vector) for key, coming in ordered)
        lacking = [len(found) * len(chunk) for chunk in self._chunks]
        ahead = _Ahead(what.step, planned, tree.halves(), memory, lacking, found.keys() - whole.keys())
        self._ahead[what.round] = ahead
        for coming in found.values():
            for span in coming.pieces:
                self._came(ahead, span)

    def _came(self, ahead: _Ahead, span: Span) -> None:
        """A piece of a part is there."""
        for number, num_values in overlaps(self._chunks, span):
            ahead.lacking[number] -= num_values
            if not ahead.lacking[number]:
                ahead.ready.add(number)

    def _go_on(self, round_: int) -> None:
        """Write what is ready of a round, unless another one's chunks are there; and say so when that was all."""
        if self._gathered is not None or self._holder not in (None, round_):
            return
        self._holder, ahead = round_, self._ahead[round_]
        self._write(ahead)
        if self._done is not None and not ahead.unfinished and len(ahead.written) == len(ahead.lacking):
            self._done(round_, ahead.step, list(ahead.planned.parts), self._server.squares())

    def _write(self, ahead: _Ahead) -> None:
        """Write what is ready."""
        for number in sorted(ahead.ready):
            chunk = self._server.chunks[number]
            ahead.planned.add(slice(chunk.start, chunk.stop))
            self._server.add_up(chunk, ahead.halves)
        ahead.written |= ahead.ready
        ahead.ready.clear()

    def _leave(self, key: Key) -> None:
        """A sum will not be finished."""
        for round_ in [round_ for round_, ahead in self._ahead.items() if key in ahead.planned.parts]:
            self._end(round_)

    def _end(self, round_: int) -> None:
        """Do not go on with a round."""
        self._give_back(self._ahead.pop(round_).memory)
        if self._holder == round_:
            self._holder = None

    def _give_back(self, memory: list[memoryview]) -> None:
        for each in memory:
            self._wire.pool.give(each)
