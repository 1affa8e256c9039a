"""Which microbatches the next update takes, and what has been applied so far. Pure.

A microbatch is (step, shard), with the plan's steps counted from 0 over all epochs. What is in flight is not part of
the state: after a restart from `state_dict` it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

Microbatch = tuple[int, int]


class Agenda(Protocol):
    """What is to be done, update by update."""

    epoch: int  # epochs applied in full

    @property
    def finished(self) -> bool:
        """Whether every epoch has been applied."""
        ...

    def next(self, shards: Sequence[int] = ()) -> tuple[Microbatch, ...]:
        """What to deal next; empty where something in flight has to be applied first, or all is dealt. A worker alone
        is better given one of `shards`."""
        ...

    def applied(self, microbatches: Iterable[Microbatch], dropped: Iterable[Microbatch] = ()) -> bool:
        """An update took these, and left out those. Whether it ended an epoch."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; where there is nothing but "epoch", from its beginning."""
        ...


class StepAgenda:
    """Synchronous: an update takes the microbatches of a step, one of each shard.

    With `may_drop`, an update may leave out some of a step's microbatches; at the end of the epoch further updates take
    those, so that each row counts once. Empty microbatches (of a last partial step) are then not dealt.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        num_shards: int,
        epochs: int,
        may_drop: bool = False,
        num_rows: Callable[[int, int], int] = lambda step_in_epoch, shard: 1,
    ) -> None:
        self._length, self._num_shards, self._epochs = steps_per_epoch, num_shards, epochs
        self._may_drop, self._num_rows = may_drop, num_rows
        self.epoch = 0
        self._applied = 0  # steps
        self._dropped: list[Microbatch] = []  # of this epoch, and not made up for
        self._dealt = 0  # steps
        self._redealt: set[Microbatch] = set()

    @property
    def finished(self) -> bool:
        return self.epoch >= self._epochs

    def next(self, shards: Sequence[int] = ()) -> tuple[Microbatch, ...]:
        last = self.epoch + 1 if self._may_drop else self._epochs
        if self._dealt < last * self._length:
            step, self._dealt = self._dealt, self._dealt + 1
            place = step % self._length
            wanted = range(self._num_shards)
            return tuple((step, k) for k in wanted if not self._may_drop or self._num_rows(place, k))
        if self._applied < self._dealt:  # which may be dropped, too
            return ()
        again = tuple(m for m in self._dropped if m not in self._redealt)[: self._num_shards]
        self._redealt.update(again)
        return again

    def applied(self, microbatches: Iterable[Microbatch], dropped: Iterable[Microbatch] = ()) -> bool:
        took, left = list(microbatches), list(dropped)
        if any(m in self._redealt for m in took + left):
            self._dropped = [m for m in self._dropped if m not in took]
            self._redealt.difference_update(took, left)
        else:
            self._applied += 1
            self._dropped += left
        ended = self._applied == (self.epoch + 1) * self._length and not self._dropped
        self.epoch += ended
        return ended

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "steps": self._applied, "dropped": [list(m) for m in self._dropped]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._applied = state.get("steps", self.epoch * self._length)
        self._dealt = self._applied
        self._dropped = [(step, shard) for step, shard in state.get("dropped", [])]
        self._redealt = set()


class FreeAgenda:
    """Asynchronous: each microbatch is an update of its own.

    A shard's microbatch of step t waits until every shard has come to step t - `staleness` (stale-synchronous
    parallel, Ho et al. 2013); None: it never waits. All wait at the end of an epoch, which is validated.
    """

    def __init__(
        self,
        steps_per_epoch: int,
        num_shards: int,
        epochs: int,
        staleness: int | None,
        num_rows: Callable[[int, int], int] = lambda step_in_epoch, shard: 1,
    ) -> None:
        self._length, self._num_shards, self._epochs = steps_per_epoch, num_shards, epochs
        self._staleness = staleness
        # An epoch's steps that have a row for the shard. A last partial step may have none.
        self._lengths = [steps_per_epoch - (num_rows(steps_per_epoch - 1, k) == 0) for k in range(num_shards)]
        self.epoch = 0
        self._start()

    def _start(self) -> None:
        self._done: list[set[int]] = [set() for _ in range(self._num_shards)]  # steps of the epoch
        self._clocks = [0] * self._num_shards  # steps of the epoch applied without a gap
        self._dealt = [0] * self._num_shards

    @property
    def finished(self) -> bool:
        return self.epoch >= self._epochs

    def next(self, shards: Sequence[int] = ()) -> tuple[Microbatch, ...]:
        if self.finished:
            return ()
        slowest = min(self._clocks)
        bound = self._length if self._staleness is None else slowest + self._staleness

        def soonest(some: Iterable[int]) -> int | None:
            free = [k for k in some if self._dealt[k] < self._lengths[k] and self._dealt[k] <= bound]
            return min(free, key=self._dealt.__getitem__, default=None)

        shard = soonest(shards)
        if shard is None:
            shard = soonest(range(self._num_shards))
        if shard is None:
            return ()
        step = self._dealt[shard]
        self._dealt[shard] = self._past(shard, step + 1)
        return ((self.epoch * self._length + step, shard),)

    def applied(self, microbatches: Iterable[Microbatch], dropped: Iterable[Microbatch] = ()) -> bool:
        for step, shard in microbatches:
            self._done[shard].add(step - self.epoch * self._length)
            while self._clocks[shard] in self._done[shard]:
                self._clocks[shard] += 1
        ended = all(len(done) == length for done, length in zip(self._done, self._lengths, strict=True))
        if ended:
            self.epoch += 1
            self._start()
        else:  # a shard without a row in the last step is not what others wait for
            for shard, length in enumerate(self._lengths):
                if self._clocks[shard] == length:
                    self._clocks[shard] = self._length
        return ended

    def state_dict(self) -> dict[str, Any]:
        ahead = [sorted(step for step in done if step >= c) for done, c in zip(self._done, self._clocks, strict=True)]
        return {"epoch": self.epoch, "clocks": list(self._clocks), "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self._start()
        if "clocks" not in state:
            return
        for shard, (clock, ahead) in enumerate(zip(state["clocks"], state["ahead"], strict=True)):
            self._clocks[shard] = clock
            self._done[shard] = {*range(min(clock, self._lengths[shard])), *ahead}
            self._dealt[shard] = self._past(shard, 0)

    def _past(self, shard: int, step: int) -> int:
        """The first step from here on that is not done."""
        while step in self._done[shard]:
            step += 1
        return step
