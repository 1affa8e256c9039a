"""Fixed-order tree sums over shards, used by worker and server.

Floating-point addition is not associative, so a sum is only the same to the bit when its order is. The order here is
an aligned binary tree over the shards 0..S-1: the node of width w (a power of two) at index i sums the shards
[i*w, min((i+1)*w, S)), always as left half + right half. A worker that holds both halves of a node may add them
itself; the result does not depend on who added, nor on when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_NO_SLOT = -1


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """The shards [first, stop): a node of the tree."""

    first: int
    stop: int

    def joins(self, right: Block, num_shards: int) -> bool:
        """Whether this block and `right` are the two halves of one node."""
        width = self.stop - self.first
        return (
            self.stop == right.first
            and width & (width - 1) == 0
            and self.first % (2 * width) == 0
            and right.stop == min(right.first + width, num_shards)
        )


@dataclass(slots=True)
class Partial:
    """What a block of shards gives to a step: sums, never means, so that blocks of any size add up right.

    `vector` (a tensor or array) is, for a training step, float32 [layout.num_floats]: the gradient of the summed loss,
    then the buffers' changes times the samples. For a validation step it is float64: the metrics' sums. `slot` says
    where in a push buffer the vector lies. `loss` and the gradient are weighted sums, and `weight` is the sum of the
    rows' weights: the number of samples where all count the same. `squares` adds up the squared norms of the
    microbatches' own gradients, of the summed loss, in the steps that take them.
    """

    vector: Any
    samples: int
    loss: float
    weight: float
    slot: int = 0
    squares: float = 0.0

    def add(self, right: Partial) -> None:
        """Add the sibling block to the right, in place."""
        self.vector += right.vector
        self.samples += right.samples
        self.loss += right.loss
        self.weight += right.weight
        self.squares += right.squares

    def plus(self, right: Partial, vector: Any) -> Partial:
        """The sum of this and the sibling block to the right, in a vector of its own, which lies in no slot."""
        vector[:] = self.vector
        total = Partial(vector, self.samples, self.loss, self.weight, _NO_SLOT, self.squares)
        total.add(right)
        return total


Finish = Callable[[Block, Partial], None]
"""What is done, in place, to a node of the tree that has just been added up."""


class TreeSum:
    """Sums the parts of a step in the fixed order, as far as what has been put allows. `finish` is done to each sum of
    two halves but the root's. What is put is added to, unless `fresh` gives vectors for sums."""

    def __init__(self, num_shards: int, finish: Finish | None = None, fresh: Callable[[], Any] | None = None) -> None:
        self._num_shards, self._finish, self._fresh = num_shards, finish, fresh
        self._by_first: dict[int, tuple[Block, Partial]] = {}
        self._by_stop: dict[int, Block] = {}

    def put(self, block: Block, part: Partial) -> list[Partial]:
        """Take a block's sum and merge halves upwards, in place. Returns the parts that were added to others and are
        free for reuse."""
        freed: list[Partial] = []
        while True:
            left = self._by_stop.get(block.first)
            right = self._by_first.get(block.stop)
            if self._is_half_of_all(block):
                break
            if left is not None and left.joins(block, self._num_shards):
                left_part = self._take(left)
                freed.append(part)
                block, part = Block(left.first, block.stop), self._sum(left_part, part)
            elif right is not None and block.joins(right[0], self._num_shards):
                right_part = self._take(right[0])
                freed.append(right_part)
                block, part = Block(block.first, right[0].stop), self._sum(part, right_part)
            else:
                break
            if self._finish is not None:
                self._finish(block, part)
        self._by_first[block.first] = (block, part)
        self._by_stop[block.stop] = block
        return freed

    def _sum(self, left: Partial, right: Partial) -> Partial:
        if self._fresh is not None and left.slot != _NO_SLOT:
            return left.plus(right, self._fresh())
        left.add(right)
        return left

    def _is_half_of_all(self, block: Block) -> bool:
        """Whether the block is one of the tree's last two: whoever averages adds them in the same pass."""
        width = 1 << (self._num_shards - 1).bit_length() >> 1
        return (block.first, block.stop) in ((0, width), (width, self._num_shards))

    def _take(self, block: Block) -> Partial:
        del self._by_stop[block.stop]
        return self._by_first.pop(block.first)[1]

    def __iter__(self) -> Iterator[tuple[Block, Partial]]:
        """The blocks that could not be merged further, in shard order."""
        return iter([self._by_first[first] for first in sorted(self._by_first)])

    def fold(self) -> tuple[Partial, ...]:
        """Add up what there is, in place, to at most two parts whose sum, left + right, is that of all that was put.

        They are the halves of the tree, once all of it was put; else whatever came, from left to right. To be called
        once, at the end.
        """
        left, *rest = [part for _, part in self]
        last = rest.pop() if rest else None
        for part in rest:
            left.add(part)
        return (left,) if last is None else (left, last)
