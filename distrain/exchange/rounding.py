"""Gradients rounded to bfloat16, so that errors cancel over the steps without anybody keeping them.

A gradient that is rounded to the nearest value loses the same part of it in every step in which it is the same. Error
feedback (Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019, "Error feedback fixes
SignSGD") has the sender keep what it lost and add it to its next gradient. Here that would be state of workers and
relays, which die, and whose shards others take over in the middle of a step: the bits would then depend on who died.
So nothing is kept. Instead the threshold above which a value is rounded up moves from step to step, along the
base-2 van der Corput sequence (van der Corput 1935): a gradient that stays the same loses nothing over 65,536 steps,
and over any n in a row less than log2(n) + 2 units in the last place (one with error feedback), where the nearest value
may lose n / 2 of them. One that changes by more than its last place from step to step is rounded without bias, as by
stochastic rounding (Gupta et al. 2015, "Deep learning with limited numerical precision").

What is rounded is every node of the tree over the shards (see reduction.py) below its root, whoever computes it. Its
thresholds are a function of the step and the node. So a sum can cross a wire in 16 bits without loss, and is the same
to the bit however shards lie on hosts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrain.learning.clipping import PIECE
from distrain.reduction import Block

_LOW_BITS = 16  # of a float32, which a bfloat16 does not have
_LOW = (1 << _LOW_BITS) - 1
_GOLDEN = 40_503  # 2^16 / the golden ratio, odd: its multiples are spread evenly, and differ among 65,536 in a row
_SILVER = 27_147  # 2^16 (sqrt(2) - 1), odd: the same for the widths of nodes
_AT_ONCE = 4 * PIECE  # values rounded at a time: fewer cost calls, more the cache


class Dither:
    """Rounds the gradients of a vector, whose first value is value `start` of the whole, in place."""

    def __init__(self) -> None:
        self._pattern = (
            (torch.arange(PIECE, dtype=torch.int64) * _GOLDEN & _LOW).to(torch.int32).repeat(_AT_ONCE // PIECE)
        )
        self._thresholds = torch.empty(_AT_ONCE, dtype=torch.int32)
        self._shift = -1  # of the thresholds there are

    def round_(self, values: Tensor, step: int, block: Block, start: int = 0) -> None:
        """Round float32 [n] to values of bfloat16, at the thresholds of a step and node.

        Values of bfloat16 stay as they are. Those that are not finite, or too large for it, come out not finite.
        """
        shift = (_reversed(step) + block.first * _GOLDEN + (block.stop - block.first) * _SILVER) & _LOW
        if shift != self._shift:
            torch.add(self._pattern, shift, out=self._thresholds).bitwise_and_(_LOW)
            self._shift = shift
        position = 0
        while position < len(values):
            place = (start + position) % PIECE
            piece = values[position : position + _AT_ONCE - place]
            _round_piece(piece, self._thresholds[place : place + len(piece)])
            position += len(piece)


def _round_piece(piece: Tensor, thresholds: Tensor) -> None:
    if not math.isfinite(torch.dot(piece, piece).item()):  # or its squares overflow
        nearest = piece.to(torch.bfloat16).to(torch.float32)  # which keeps what is not finite
        is_finite = torch.isfinite(piece)
        _add_thresholds(piece, thresholds)
        torch.where(is_finite, piece, nearest, out=piece)
    else:
        _add_thresholds(piece, thresholds)


def _add_thresholds(piece: Tensor, thresholds: Tensor) -> None:
    """Round the magnitude up where its low bits and the threshold make a carry, else down."""
    piece.view(torch.int32).add_(thresholds).bitwise_and_(~_LOW)


def _reversed(step: int) -> int:
    """The low 16 bits of a number, in reverse: 2^16 times its element of the van der Corput sequence."""
    return int(f"{step & _LOW:016b}"[::-1], 2)
