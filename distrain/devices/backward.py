"""Backward passes that say which gradients are all there while they go on (as in Li et al. 2020, "PyTorch Distributed",
section 3.2.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from distrain.errors import TrainingError
from distrain.exchange.layout import Bucket, Layout


class Backward:
    """Runs a model's backward passes. If `early`, `complete` is told of each bucket whose gradients are there, from
    within the last pass of a microbatch and in the thread that autograd runs in; else of none."""

    def __init__(self, model: nn.Module, layout: Layout, complete: Callable[[Bucket], None], early: bool) -> None:
        self._layout, self._complete = layout, complete
        self._parameters = list(model.parameters())
        self._missing: dict[Bucket, set[int]] = {}  # the parameters that the last pass has not reached yet
        self._scale, self._is_last = 0.0, False
        if early:
            for bucket in layout.buckets:
                for index in bucket.indices:
                    if self._parameters[index].requires_grad:
                        arrived = partial(self._arrived, bucket, index)
                        self._parameters[index].register_post_accumulate_grad_hook(arrived)

    def begin(self, scale: float) -> None:
        """Begin a microbatch. Its losses are multiplied by `scale`, unless that is 0."""
        self._scale, self._is_last = scale, False
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self._layout.buckets:
            self._missing[bucket] = {index for index in bucket.indices if self._parameters[index].requires_grad}

    def run(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of a loss; with `is_last`, nothing is added after it.

        Raises TrainingError where a parameter's gradient then comes in several parts, if told of `early`.
        """
        self._is_last = is_last
        (loss * self._scale if self._scale else loss).backward()

    def rest(self) -> list[Bucket]:
        """The buckets that `complete` was not told of. To be called when the last pass is over."""
        return list(self._missing)

    def put(self, bucket: Bucket, into: list[Tensor]) -> None:
        """Move a bucket's gradients, sparse ones too, divided by the scale, to their views of a vector, which are given
        for all parameters. The scale is a power of two, so that dividing costs no bit unless the quotient is below
        float32's normal numbers."""
        for index in bucket.indices:
            gradient = self._parameters[index].grad
            if gradient is None:
                into[index].zero_()
            elif self._scale:
                torch.mul(gradient.to_dense(), 1.0 / self._scale, out=into[index])
            else:
                into[index].copy_(gradient.to_dense())
            self._parameters[index].grad = None  # its memory is for those to come

    def _arrived(self, bucket: Bucket, index: int, _: Tensor) -> None:
        """A parameter's gradient is there: autograd calls this as soon as it is."""
        if not self._is_last:
            return
        missing = self._missing.get(bucket, set())
        if index not in missing:
            raise TrainingError(
                f"the gradient of {self._layout.parameters[index].name} comes in several parts, as when it is used "
                "inside and outside of a reentrant checkpoint; give torch.utils.checkpoint use_reentrant=False"
            )
        missing.remove(index)
        if not missing:
            del self._missing[bucket]
            self._complete(bucket)
